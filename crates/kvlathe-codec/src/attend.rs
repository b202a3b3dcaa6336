//! Attention's two products with a packed block, in the coefficient domain: nothing is expanded.
//!
//! With levels u (codes as numbers), steps s, gain γ, synthesis S, mean table m = R(δ)·μ of a block:
//!
//! * **score** of a query q, turned to the block's frame: q·x̂ = γ·(q·m + s·(Sᵀq)·u). Sᵀq is computed once a block.
//! * **accumulation** with weights p: Σₜ pₜ·x̂ₜ = S·(Σₜ pₜγₜsₜ·uₜ) + μ·Σₜ pₜγₜ. The bracket is what is summed, over all
//!   blocks; S is applied once at the end. Values are not rotated, so their mean is one vector.

use crate::basis::StreamTables;
use crate::error::{Result, check_len};
use crate::kernels::{self, Isa, LANES, Scratch};
use crate::rope::Rotation;

/// Σ p·γ·s·u of several queries, and the weight of the mean.
#[derive(Debug, Clone, PartialEq)]
pub struct CoefficientSums {
    pub(crate) n_queries: usize,
    /// `[n_queries, n_coded, LANES]`: partial sums of every LANES-th token, added up at the end.
    pub(crate) sums: Vec<f32>,
    /// `[n_queries, LANES]`: Σ p·γ, likewise.
    pub(crate) mean_weights: Vec<f32>,
}

impl CoefficientSums {
    /// Zero.
    #[must_use]
    pub fn new(tables: &StreamTables, n_queries: usize) -> Self {
        Self {
            n_queries,
            sums: vec![0.0; n_queries * tables.n_coded() * LANES],
            mean_weights: vec![0.0; n_queries * LANES],
        }
    }

    /// Multiplies all sums of a query by a factor: an online softmax has found a larger score.
    pub fn scale(&mut self, query: usize, factor: f32) {
        let n = self.sums.len() / self.n_queries;
        self.sums[query * n..(query + 1) * n].iter_mut().for_each(|v| *v *= factor);
        self.mean_weights[query * LANES..(query + 1) * LANES].iter_mut().for_each(|v| *v *= factor);
    }
}

impl StreamTables {
    /// `scores[q, t]` = q·x̂ₜ for `queries` `[n, head_dim]` that are not yet in the block's frame; `turn_back` is R(−c).
    ///
    /// `scores` is `[n, block_len]`.
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for.
    pub fn score_block(
        &self,
        isa: Isa,
        packed: &[u8],
        turn_back: Option<&Rotation>,
        queries: &[f32],
        scores: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let n = queries.len() / self.head_dim;
        check_len("the queries", queries.len(), n * self.head_dim)?;
        check_len("the scores", scores.len(), n * self.block_len)?;
        check_len("the packed block", packed.len(), self.block_bytes())?;
        scratch.fit(self);
        scratch.fit_queries(self, n);
        kernels::score(isa, self, packed, turn_back, queries, scores, scratch);
        Ok(())
    }

    /// Adds Σₜ pₜ·x̂ₜ to `sums`, in the coefficient domain; `weights` p is `[n_queries, block_len]`.
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for.
    pub fn accumulate_block(
        &self,
        isa: Isa,
        packed: &[u8],
        weights: &[f32],
        sums: &mut CoefficientSums,
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_len("the weights", weights.len(), sums.n_queries * self.block_len)?;
        check_len("the sums", sums.sums.len(), sums.n_queries * self.n_coded() * LANES)?;
        check_len("the packed block", packed.len(), self.block_bytes())?;
        scratch.fit(self);
        scratch.fit_queries(self, sums.n_queries);
        kernels::accumulate(isa, self, packed, weights, sums, scratch);
        Ok(())
    }

    /// Adds what `sums` stand for to `out`, `[n_queries, head_dim]`: the inverse transform, once.
    ///
    /// # Errors
    /// An output of another length.
    pub fn finish_sums(&self, sums: &CoefficientSums, out: &mut [f32]) -> Result<()> {
        let n_coded = self.n_coded();
        check_len("the output", out.len(), sums.n_queries * self.head_dim)?;
        for (q, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
            let lanes = &sums.sums[q * n_coded * LANES..(q + 1) * n_coded * LANES];
            let coefficients: Vec<f32> = lanes.chunks_exact(LANES).map(|l| l.iter().sum()).collect();
            let mean_weight: f32 = sums.mean_weights[q * LANES..(q + 1) * LANES].iter().sum();
            for (j, value) in out.iter_mut().enumerate() {
                let row = &self.synthesis[j * n_coded..(j + 1) * n_coded];
                let sum: f32 = row.iter().zip(&coefficients).map(|(s, c)| s * c).sum();
                *value += sum + mean_weight * self.shape_mean[j * self.block_len];
            }
        }
        Ok(())
    }
}
