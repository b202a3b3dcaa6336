//! What a part of the tokens contributes to a softmax, and how parts are joined.

use kvlathe_codec::{CoefficientSums, StreamTables, best_isa, memory, shrinkage};

use crate::error::Result;

/// The weighted sum of a part's values for the queries of one KV head, relative to the part's largest scores.
///
/// Parts are joined as in split-k flash decoding: both are brought to the larger maximum.
#[derive(Debug)]
pub(super) struct Partial {
    /// `[n]`: the largest score, −∞ while nothing was seen.
    pub(super) max: Vec<f32>,
    /// `[n]`: Σ e^(score − max).
    pub(super) sum: Vec<f32>,
    /// `[n, value_dim]`: of exact tokens.
    pub(super) out: Vec<f32>,
    /// Of packed tokens, in the coefficient domain; `None` if there are none.
    pub(super) coefficients: Option<CoefficientSums>,
}

impl Partial {
    /// Nothing yet, for `n` queries.
    pub(super) fn new(value_dim: usize, n: usize) -> Result<Self> {
        let out = memory::filled(n * value_dim, 0.0, "the output of attention")?;
        Ok(Self { max: vec![f32::NEG_INFINITY; n], sum: vec![0.0; n], out, coefficients: None })
    }

    /// Multiplies what was summed for a query by a factor: a larger score has been found.
    pub(super) fn rescale(&mut self, query: usize, factor: f32) {
        if factor != 1.0 {
            if let Some(coefficients) = &mut self.coefficients {
                coefficients.scale(query, factor);
            }
            self.out_of(query).iter_mut().for_each(|v| *v *= factor);
        }
    }

    fn out_of(&mut self, query: usize) -> &mut [f32] {
        let dim = self.out.len() / self.max.len();
        &mut self.out[query * dim..(query + 1) * dim]
    }

    /// Takes in another part of the same queries.
    pub(super) fn merge(&mut self, values: &StreamTables, other: &Self) {
        let n = self.max.len();
        for q in 0..n {
            let largest = self.max[q].max(other.max[q]);
            if largest == f32::NEG_INFINITY {
                continue;
            }
            let (ours, theirs) = (shrinkage(self.max[q], largest), shrinkage(other.max[q], largest));
            self.rescale(q, ours);
            self.sum[q] = self.sum[q] * ours + other.sum[q] * theirs;
            if let Some(more) = &other.coefficients {
                let ours = self.coefficients.get_or_insert_with(|| CoefficientSums::new(values, n));
                ours.add(q, more, theirs);
            }
            let dim = other.out.len() / other.max.len();
            for (o, v) in self.out_of(q).iter_mut().zip(&other.out[q * dim..(q + 1) * dim]) {
                *o += v * theirs;
            }
            self.max[q] = largest;
        }
    }

    /// A score that takes weight but has no value (gpt-oss).
    pub(super) fn add_sink(&mut self, query: usize, score: f32) {
        let largest = self.max[query].max(score);
        let shrink = shrinkage(self.max[query], largest);
        self.sum[query] = self.sum[query] * shrink + shrinkage(score, largest);
        self.rescale(query, shrink);
        self.max[query] = largest;
    }

    /// The attention's output `[n, value_dim]`: zeros for a query that saw nothing (a row of padding), not NaN.
    pub(super) fn finish(mut self, values: &StreamTables) -> Result<Vec<f32>> {
        if let Some(coefficients) = &self.coefficients {
            values.finish_sums(best_isa(), coefficients, &mut self.out)?;
        }
        for q in 0..self.max.len() {
            let inverse = if self.sum[q] == 0.0 { 0.0 } else { 1.0 / self.sum[q] };
            self.out_of(q).iter_mut().for_each(|v| *v *= inverse);
        }
        Ok(self.out)
    }
}
