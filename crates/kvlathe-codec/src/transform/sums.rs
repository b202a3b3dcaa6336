//! Sums of weighted vectors, kept as coefficients: the inverse transform is applied once, at the end.

use std::ops::Range;

use super::tables::StreamTables;
use crate::error::Result;
use crate::memory;

/// Σ p·γ·(s·u + a) of several queries, and the weight of the mean.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CoefficientSums {
    /// `[n_queries, head_dim]`.
    pub(crate) sums: Vec<f32>,
    /// `[n_queries]`: Σ p·γ.
    pub(crate) mean_weights: Vec<f32>,
}

impl CoefficientSums {
    /// Zero.
    #[must_use]
    pub fn new(tables: &StreamTables, n_queries: usize) -> Self {
        Self { sums: vec![0.0; n_queries * tables.head_dim()], mean_weights: vec![0.0; n_queries] }
    }

    /// Back to zero, for another number of queries or stream perhaps; what was allocated serves again.
    ///
    /// # Errors
    /// No memory.
    pub fn reset(&mut self, tables: &StreamTables, n_queries: usize) -> Result<()> {
        memory::refill(&mut self.sums, n_queries * tables.head_dim(), 0.0, "sums of coefficients")?;
        memory::refill(&mut self.mean_weights, n_queries, 0.0, "sums of weights")
    }

    pub(crate) fn n_queries(&self) -> usize {
        self.mean_weights.len()
    }

    fn of(&self, query: usize) -> Range<usize> {
        let n = self.sums.len() / self.n_queries();
        query * n..(query + 1) * n
    }

    /// Multiplies all sums of a query by a factor: an online softmax has found a larger score.
    pub fn scale(&mut self, query: usize, factor: f32) {
        let range = self.of(query);
        self.sums[range].iter_mut().for_each(|v| *v *= factor);
        self.mean_weights[query] *= factor;
    }

    /// Adds another's sums of a query, times a factor.
    pub fn add(&mut self, query: usize, other: &Self, factor: f32) {
        let range = self.of(query);
        for (sum, more) in self.sums[range.clone()].iter_mut().zip(&other.sums[range]) {
            *sum += more * factor;
        }
        self.mean_weights[query] += other.mean_weights[query] * factor;
    }
}
