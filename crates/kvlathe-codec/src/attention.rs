//! Attention's two products with packed blocks, in the coefficient domain: nothing is expanded.
//!
//! With levels u (codes as numbers), drift a, step factor s, gain γ, synthesis S, mean table m = R(δ)·μ of a block:
//!
//! * **score** of a query q, turned to the block's frame: q·x̂ = γ·(q·m + (Sᵀq)·a + s·(Sᵀq)·u). Sᵀq is computed once a
//!   block, and so is its product with the drift.
//! * **accumulation** with weights p: Σₜ pₜ·x̂ₜ = S·(Σₜ pₜγₜsₜ·uₜ + a·Σₜ pₜγₜ) + μ·Σₜ pₜγₜ. The bracket is what is summed,
//!   over all blocks; S is applied once at the end. Values are not rotated, so their mean is one vector.
//!
//! A level is its code, a byte, and a constant, so the long products multiply codes by integers: q, Sᵀq and pₜγₜsₜ are
//! rounded to 16 bits. The error of a score is below 10⁻⁴·‖q‖·‖x̂‖ where coded coefficients suffer about the same distortion,
//! as calibrated ones do (below 10⁻³ in any case tried), that of a sum typically 2·10⁻⁵·Σ pₜ‖x̂ₜ‖, at most
//! max(pₜγₜsₜ)/65,400 for each level of each token: what the codes themselves leave out is a hundred times as much.

use crate::dispatch;
use crate::error::{Result, check_len};
use crate::scratch::Scratch;
use crate::simd::isa::Isa;
use crate::transform::queries::Queries;
use crate::transform::rope::RotationWalk;
use crate::transform::sums::CoefficientSums;
use crate::transform::tables::StreamTables;

/// Most tokens that [`StreamTables::accumulate_blocks`] takes at once: their codes stay in the first-level cache.
pub const MAX_TOKENS_AT_ONCE: usize = 1024;

impl StreamTables {
    /// `scores[q, t]` = q·x̂ₜ over consecutive packed blocks; `walk` stands at the first one's R(−c) and goes on to the
    /// block after the last.
    ///
    /// `scores` is `[n_queries, blocks · block_len]`. `upcoming` is what will be read next (the packed values, say): it is
    /// fetched into the cache meanwhile.
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for, a walk for keys that are not rotated or none for those that are.
    #[expect(clippy::too_many_arguments, reason = "what one call of attention needs")]
    pub fn score_blocks(
        &self,
        isa: Isa,
        blocks: &[&[u8]],
        walk: Option<&mut RotationWalk>,
        queries: &Queries,
        upcoming: &[&[u8]],
        scores: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let n = queries.len();
        check_len("the queries", queries.scaled.len(), n * self.query_tables().n_places())?;
        check_len("the scores", scores.len(), n * blocks.len() * self.block_len())?;
        check_len("the walks of rotations", usize::from(walk.is_some()), usize::from(self.rope.is_some()))?;
        self.check_blocks(blocks)?;
        scratch.scoring.fit(self, n)?;
        dispatch::score(isa, self, blocks, walk, queries, upcoming, scores, &mut scratch.scoring);
        Ok(())
    }

    /// Adds Σₜ pₜ·x̂ₜ over packed blocks to `sums`, in the coefficient domain; `weights` p, at least 0, are
    /// `[n_queries, blocks · block_len]`.
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for, more than [`MAX_TOKENS_AT_ONCE`] tokens.
    pub fn accumulate_blocks(
        &self,
        isa: Isa,
        blocks: &[&[u8]],
        weights: &[f32],
        sums: &mut CoefficientSums,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (n_queries, n_tokens) = (sums.n_queries(), blocks.len() * self.block_len());
        check_len("the weights", weights.len(), n_queries * n_tokens)?;
        check_len("the sums", sums.sums.len(), n_queries * self.head_dim())?;
        check_len("tokens beyond the most at once", n_tokens.saturating_sub(MAX_TOKENS_AT_ONCE), 0)?;
        self.check_blocks(blocks)?;
        scratch.summing.fit(self, n_queries, blocks.len())?;
        dispatch::accumulate(isa, self, blocks, weights, sums, &mut scratch.summing);
        Ok(())
    }

    /// Adds what `sums` stand for to `out`, `[n_queries, head_dim]`: the inverse transform, once.
    ///
    /// # Errors
    /// An output of another length, no memory.
    pub fn finish_sums(
        &self,
        isa: Isa,
        sums: &CoefficientSums,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        check_len("the output", out.len(), sums.n_queries() * self.head_dim())?;
        scratch.summing.fit_vectors(self, sums.n_queries())?;
        dispatch::finish(isa, self, sums, out, &mut scratch.summing);
        Ok(())
    }

    fn check_blocks(&self, blocks: &[&[u8]]) -> Result<()> {
        blocks.iter().try_for_each(|block| check_len("the packed block", block.len(), self.block_bytes()))
    }
}
