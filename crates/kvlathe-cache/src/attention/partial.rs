//! What a part of the tokens contributes to a softmax, and how parts are joined.

use kvlathe_codec::{CoefficientSums, Scratch, StreamTables, best_isa, memory, rescale_factor};

use crate::error::Result;

/// The weighted sum of a part's values for the queries of one KV head, relative to the part's largest scores.
///
/// Parts are joined as in split-k flash decoding: both are brought to the larger maximum.
#[derive(Debug, Default)]
pub(super) struct Partial {
    /// `[n]`: the largest score, −∞ while nothing was seen.
    pub(super) max: Vec<f32>,
    /// `[n]`: Σ e^(score − max).
    pub(super) sum: Vec<f32>,
    /// `[n, value_dim]`: of exact tokens.
    pub(super) out: Vec<f32>,
    /// Of packed tokens, in the coefficient domain, if there are any.
    coefficients: CoefficientSums,
    has_packed: bool,
}

impl Partial {
    /// Back to nothing, for `n` queries; what was allocated serves again.
    pub(super) fn clear(&mut self, value_dim: usize, n: usize) -> Result<()> {
        let what = "the output of attention";
        memory::refill(&mut self.max, n, f32::NEG_INFINITY, what)?;
        memory::refill(&mut self.sum, n, 0.0, what)?;
        memory::refill(&mut self.out, n * value_dim, 0.0, what)?;
        self.has_packed = false;
        Ok(())
    }

    /// Sums of packed tokens, with the largest scores and the sums of weights beside them.
    pub(super) fn packed(
        &mut self,
        values: &StreamTables,
    ) -> Result<(&mut CoefficientSums, &mut [f32], &mut [f32])> {
        if !self.has_packed {
            self.coefficients.reset(values, self.max.len())?;
            self.has_packed = true;
        }
        Ok((&mut self.coefficients, &mut self.max, &mut self.sum))
    }

    /// Multiplies what was summed for a query by a factor: a larger score has been found.
    pub(super) fn rescale(&mut self, query: usize, factor: f32) {
        if factor != 1.0 {
            if self.has_packed {
                self.coefficients.scale(query, factor);
            }
            self.out_of(query).iter_mut().for_each(|v| *v *= factor);
        }
    }

    fn out_of(&mut self, query: usize) -> &mut [f32] {
        let dim = self.out.len() / self.max.len();
        &mut self.out[query * dim..(query + 1) * dim]
    }

    /// Takes in another part of the same queries.
    pub(super) fn merge(&mut self, values: &StreamTables, other: &Self) -> Result<()> {
        if other.has_packed {
            self.packed(values)?;
        }
        for q in 0..self.max.len() {
            let largest = self.max[q].max(other.max[q]);
            if largest == f32::NEG_INFINITY {
                continue;
            }
            let (ours, theirs) =
                (rescale_factor(self.max[q], largest), rescale_factor(other.max[q], largest));
            self.rescale(q, ours);
            self.sum[q] = self.sum[q] * ours + other.sum[q] * theirs;
            if other.has_packed {
                self.coefficients.add(q, &other.coefficients, theirs);
            }
            let dim = other.out.len() / other.max.len();
            for (o, v) in self.out_of(q).iter_mut().zip(&other.out[q * dim..(q + 1) * dim]) {
                *o += v * theirs;
            }
            self.max[q] = largest;
        }
        Ok(())
    }

    /// A score that takes weight but has no value (gpt-oss).
    pub(super) fn add_sink(&mut self, query: usize, score: f32) {
        let largest = self.max[query].max(score);
        let factor = rescale_factor(self.max[query], largest);
        self.sum[query] = self.sum[query] * factor + rescale_factor(score, largest);
        self.rescale(query, factor);
        self.max[query] = largest;
    }

    /// log Σ e^score of a query; −∞ where nothing was seen.
    pub(super) fn log_sum_exp(&self, query: usize) -> f32 {
        self.max[query] + self.sum[query].ln()
    }

    /// The attention's output `[n, value_dim]`: zeros for a query that saw nothing (a row of padding), not NaN.
    pub(super) fn finish(&mut self, values: &StreamTables, scratch: &mut Scratch) -> Result<()> {
        if self.has_packed {
            values.finish_sums(best_isa(), &self.coefficients, &mut self.out, scratch)?;
        }
        for q in 0..self.max.len() {
            let inverse = if self.sum[q] == 0.0 { 0.0 } else { 1.0 / self.sum[q] };
            self.out_of(q).iter_mut().for_each(|v| *v *= inverse);
        }
        Ok(())
    }
}
