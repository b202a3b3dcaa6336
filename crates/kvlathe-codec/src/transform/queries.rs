//! Queries made ready for scoring, in 16-bit integers.
//!
//! A query q is scaled to the norm [`NORM`] and, in each block's frame, rounded to integers; so is each column of the
//! synthesis. By Cauchy and Schwarz every product of the two, partial sums included, then fits in 32 bits. The products
//! of one query and block are rounded again, against their largest, for the product with the codes. Rounding errors
//! are about 10⁻⁵ of ‖q‖·‖x‖: far below the error that codes of a few bits bring. The mean's part, which may be large,
//! and the drift's, which is one number a block, stay in float32.

use super::query_tables::{NORM, QueryTables};
use super::tables::StreamTables;
use crate::aligned::Aligned;
use crate::error::Result;
use crate::format::layout::MAX_HEAD_DIM;
use crate::lanes::{LANES, total};
use crate::memory;

/// The Euclidean norm; eight sums, so that no addition waits for all others.
fn norm(vector: &[f32]) -> f32 {
    let (groups, rest) = vector.as_chunks::<LANES>();
    let mut squares = [0.0f32; LANES];
    for group in groups {
        for l in 0..LANES {
            squares[l] += group[l] * group[l];
        }
    }
    (total(squares) + rest.iter().map(|v| v * v).sum::<f32>()).sqrt()
}

/// The queries that share a KV head, scaled and ordered for [`StreamTables::score_blocks`].
#[derive(Debug, Clone, Default)]
pub struct Queries {
    /// `[n, n_places]`, each of norm [`NORM`] (or zero).
    pub(crate) scaled: Aligned<f32>,
    /// `[n, n_pairs]`: e and o of [`MeanTables`](super::query_tables::MeanTables), of the scaled queries in the frame of
    /// position 0.
    pub(crate) mean_even: Aligned<f32>,
    pub(crate) mean_odd: Aligned<f32>,
    /// `[n]`: products with the mean of the components that do not turn.
    pub(crate) mean_rest: Vec<f32>,
    /// `[n]`: factor that undoes the scaling.
    pub(crate) factors: Vec<f32>,
    pub(crate) n_places: usize,
}

impl Queries {
    /// `queries` `[n, head_dim]`, ready for a stream.
    ///
    /// # Errors
    /// No memory.
    pub fn new(tables: &StreamTables, queries: &[f32]) -> Result<Self> {
        let mut ready = Self::default();
        ready.prepare(tables, queries)?;
        Ok(ready)
    }

    /// Becomes other queries, `[n, head_dim]`, of another stream perhaps; what was allocated serves again.
    ///
    /// # Errors
    /// No memory.
    pub fn prepare(&mut self, tables: &StreamTables, queries: &[f32]) -> Result<()> {
        let QueryTables { places, mean, .. } = tables.query_tables();
        let (d, n_pairs, n_places) = (tables.head_dim(), mean.n_pairs, places.len());
        let (n, what) = (queries.len() / d, "queries");
        self.scaled.resize(n * n_places, what)?;
        self.mean_even.resize(n * n_pairs, what)?;
        self.mean_odd.resize(n * n_pairs, what)?;
        memory::refill(&mut self.mean_rest, n, 0.0, what)?;
        memory::refill(&mut self.factors, n, 0.0, what)?;
        self.n_places = n_places;
        let (mean_left, mean_rest) = mean.turned.split_at(n_pairs);
        let (mean_right, mean_rest) = mean_rest.split_at(n_pairs);
        // Behind the components stands what places of padding hold.
        let mut padded = [0.0; MAX_HEAD_DIM + 1];
        for (q, query) in queries.chunks_exact(d).enumerate() {
            padded[..d].copy_from_slice(query);
            let norm = norm(query);
            let scale = if norm > 0.0 { NORM / norm } else { 0.0 };
            self.factors[q] = norm / NORM;
            let scaled = &mut self.scaled[q * n_places..][..n_places];
            for (to, place) in scaled.iter_mut().zip(places) {
                *to = padded[*place] * scale;
            }

            let (left, rest) = scaled.split_at(n_pairs);
            let (right, rest) = rest.split_at(n_pairs);
            let run = q * n_pairs..(q + 1) * n_pairs;
            let (even, odd) = (&mut self.mean_even[run.clone()], &mut self.mean_odd[run]);
            for i in 0..n_pairs {
                even[i] = left[i] * mean_left[i] + right[i] * mean_right[i];
                odd[i] = right[i] * mean_left[i] - left[i] * mean_right[i];
            }
            self.mean_rest[q] = rest.iter().zip(mean_rest).map(|(q, m)| q * m).sum();
        }
        Ok(())
    }

    /// How many queries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.factors.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }
}
