//! Queries made ready for scoring, in 16-bit integers.
//!
//! A query q is scaled to the norm [`NORM`] and, in each block's frame, rounded to integers; so is each column of the
//! synthesis. By Cauchy and Schwarz every product of the two, partial sums included, then fits in 32 bits. The products
//! of one query and block are rounded again, against their largest, for the product with the levels. Rounding errors
//! are about 10⁻⁵ of ‖q‖·‖x‖: far below the error that codes of a few bits bring. The mean's part, which may be large,
//! stays in float32.

use crate::basis::StreamTables;
use crate::kernels::LANES;
use crate::rope::{Pairing, Rope};

/// Norm of scaled queries and synthesis columns: rounding to integers keeps their entries within 16 bits.
const NORM: f32 = 32_700.0;

/// What scoring needs of a stream, with rotated components in the order of [`Pairing::HalfSplit`].
#[derive(Debug, Clone)]
pub(crate) struct QueryTables {
    /// `[head_dim/2, n_padded, 2]`: columns of V times their step, each scaled to norm [`NORM`] and rounded.
    pub(crate) synthesis: Vec<i16>,
    /// `[n_padded]`: what a product of a column with a query of norm [`NORM`] is worth, times one half because levels
    /// are doubled.
    pub(crate) column_units: Vec<f32>,
    /// The mean's part of scores.
    pub(crate) mean: MeanTables,
    /// What the largest product of a query is rounded to; Σ |product|·|doubled level| then stays below 2³¹.
    pub(crate) largest_projected: f32,
    /// `order[i]` is the component that stands at place i.
    order: Vec<usize>,
}

impl QueryTables {
    pub(crate) fn new(tables: &StreamTables) -> Self {
        let (d, n_coded, n_padded) = (tables.head_dim, tables.n_coded(), tables.n_padded());
        let order = half_split_order(tables.rope.as_ref(), d);
        let mean = MeanTables::new(tables, &order);
        let norms: Vec<f32> = (0..n_coded)
            .map(|i| (0..d).map(|j| tables.synthesis[j * n_coded + i].powi(2)).sum::<f32>().sqrt())
            .collect();

        let mut synthesis = vec![0i16; d * n_padded];
        for (j, &component) in order.iter().enumerate() {
            for (i, norm) in norms.iter().enumerate().filter(|(_, norm)| **norm > 0.0) {
                let value = tables.synthesis[component * n_coded + i] * (NORM / norm);
                synthesis[(j / 2 * n_padded + i) * 2 + j % 2] = value.round() as i16;
            }
        }
        let mut column_units: Vec<f32> = norms.iter().map(|norm| 0.5 * norm / NORM).collect();
        column_units.resize(n_padded, 0.0);
        let sum_of_levels: usize = tables.coded.iter().map(|coded| 2 * coded.width.half_levels() - 1).sum();
        let largest_projected = NORM.min(2.14e9 / sum_of_levels.max(1) as f32);
        Self { synthesis, column_units, mean, largest_projected, order }
    }
}

/// q·R(δ)·μ for all tokens of a block, by symmetry in half the multiplications.
///
/// A block of n tokens has the offsets δ = φ − ½ with φ = ±½, ±1½ … With μ' = R(−½)·μ, a pair (a, b) of the query and
/// one (α, β) of μ' give (aα + bβ)·cos θφ + (bα − aβ)·sin θφ: the first part is even in φ, the second odd.
#[derive(Debug, Clone)]
pub(crate) struct MeanTables {
    /// `[head_dim]`: μ', in half-split order.
    pub(crate) turned: Vec<f32>,
    /// `[n_even, width]`: cos θφ for φ = ½, 1½ …, one row a pair; then rows of ones for components that do not turn.
    pub(crate) even: Vec<f32>,
    /// `[n_pairs, width]`: sin θφ.
    pub(crate) odd: Vec<f32>,
    pub(crate) n_pairs: usize,
    /// Rows of `even`.
    pub(crate) n_even: usize,
    /// Half a block, at least eight.
    pub(crate) width: usize,
}

impl MeanTables {
    fn new(tables: &StreamTables, order: &[usize]) -> Self {
        let (d, n) = (tables.head_dim, tables.block_len);
        let inv_freq = tables.rope.as_ref().map_or(&[][..], Rope::inv_freq);
        let (n_pairs, width) = (inv_freq.len(), (n / 2).max(LANES));
        let n_even = d - n_pairs;
        let mean: Vec<f64> = order.iter().map(|&j| f64::from(tables.mean(j))).collect();
        let mut turned = mean.clone();
        let (mut even, mut odd) = (vec![1.0; n_even * width], vec![0.0; n_pairs * width]);
        for (j, &frequency) in inv_freq.iter().enumerate() {
            let (sin, cos) = (-0.5 * frequency).sin_cos();
            let (a, b) = (mean[j], mean[n_pairs + j]);
            (turned[j], turned[n_pairs + j]) = (a * cos - b * sin, b * cos + a * sin);
            for i in 0..width {
                let (sin, cos) = (frequency * (i as f64 + 0.5)).sin_cos();
                even[j * width + i] = cos as f32;
                odd[j * width + i] = sin as f32;
            }
        }
        let turned = turned.into_iter().map(|v| v as f32).collect();
        Self { turned, even, odd, n_pairs, n_even, width }
    }
}

/// Half-split order of the components: first those that turn to the left, then their partners, then the rest.
fn half_split_order(rope: Option<&Rope>, d: usize) -> Vec<usize> {
    match rope.map(|rope| (rope.pairing(), rope.rotary_dim())) {
        Some((Pairing::Interleaved, rotary_dim)) => {
            (0..rotary_dim).step_by(2).chain((1..rotary_dim).step_by(2)).chain(rotary_dim..d).collect()
        }
        _ => (0..d).collect(),
    }
}

/// The queries that share a KV head, scaled and ordered for [`StreamTables::score_blocks`].
#[derive(Debug, Clone, Default)]
pub struct Queries {
    /// `[n, head_dim]`, each of norm [`NORM`] (or zero).
    pub(crate) scaled: Vec<f32>,
    /// `[n]`: factor that undoes the scaling.
    pub(crate) factors: Vec<f32>,
}

impl Queries {
    /// Takes over `queries` `[n, head_dim]`.
    pub fn set(&mut self, tables: &StreamTables, queries: &[f32]) {
        let order = &tables.query_tables().order;
        self.scaled.clear();
        self.factors.clear();
        for query in queries.chunks_exact(tables.head_dim) {
            let norm = query.iter().map(|v| v * v).sum::<f32>().sqrt();
            let scale = if norm > 0.0 { NORM / norm } else { 0.0 };
            self.scaled.extend(order.iter().map(|&component| query[component] * scale));
            self.factors.push(norm / NORM);
        }
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
