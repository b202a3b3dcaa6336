//! Queries made ready for scoring, in 16-bit integers.
//!
//! A query q is scaled to the norm [`NORM`] and, in each block's frame, rounded to integers; so is each column of the
//! synthesis. By Cauchy and Schwarz every product of the two, partial sums included, then fits in 32 bits. The products
//! of one query and block are rounded again, against their largest, for the product with the codes. Rounding errors
//! are about 10⁻⁵ of ‖q‖·‖x‖: far below the error that codes of a few bits bring. The mean's part, which may be large,
//! and the drift's, which is one number a block, stay in float32.

use crate::basis::{MAX_HEAD_DIM, StreamTables};
use crate::error::Result;
use crate::kernels::{LANES, WIDE, total};
use crate::lines::Lines;
use crate::memory;
use crate::rope::{Pairing, Rope};
use crate::width::Width;

/// Norm of scaled queries and synthesis columns: rounding to integers keeps their entries within 16 bits.
const NORM: f32 = 32_700.0;

/// What scoring needs of a stream. Components stand at *places*: first those that turn to the left, then their partners,
/// then the rest, each of the three padded with zeros to whole vectors of sixteen.
#[derive(Debug, Clone)]
pub(crate) struct QueryTables {
    /// `[n_places/2, n_padded, 2]`: columns of V times their step, each scaled to norm [`NORM`] and rounded.
    pub(crate) synthesis: Lines<i16>,
    /// `[n_padded]`: what a product of a column with a query of norm [`NORM`] is worth.
    pub(crate) column_units: Lines<f32>,
    /// `[n_padded]`: the same, and zero for coefficients without a row of codes.
    pub(crate) row_units: Lines<f32>,
    /// [`Width::level_offset`] of coefficients with a row of codes, padded with zeros
    /// to whole vectors of sixteen.
    pub(crate) level_offsets: Lines<f32>,
    /// The mean's part of scores.
    pub(crate) mean: MeanTables,
    /// What the largest product of a query is rounded to; Σ |product|·code then stays below 2³¹.
    pub(crate) largest_projected: f32,
    /// The component at each place; `head_dim` where it is padding.
    places: Vec<usize>,
}

impl QueryTables {
    pub(crate) fn new(tables: &StreamTables) -> Self {
        let (d, n_padded) = (tables.head_dim, tables.n_padded());
        let places = places(tables.rope.as_ref(), d);
        let mean = MeanTables::new(tables, &places);
        let norms: Vec<f32> =
            (0..d).map(|i| (0..d).map(|j| tables.synthesis[j * d + i].powi(2)).sum::<f32>().sqrt()).collect();

        let mut synthesis = vec![0i16; places.len() * n_padded];
        for (place, component) in places.iter().copied().enumerate().filter(|(_, c)| *c < d) {
            for (i, norm) in norms.iter().enumerate().filter(|(_, norm)| **norm > 0.0) {
                let value = tables.synthesis[component * d + i] * (NORM / norm);
                synthesis[(place / 2 * n_padded + i) * 2 + place % 2] = value.round() as i16;
            }
        }
        let mut column_units: Vec<f32> = norms.iter().map(|norm| norm / NORM).collect();
        column_units.resize(n_padded, 0.0);
        let mut row_units = column_units.clone();
        row_units[tables.n_coded()..].fill(0.0);
        let [column_units, row_units] = [column_units, row_units].map(|units| Lines::from(&units[..]));
        let coded = || tables.widths().take(tables.n_coded());
        let mut level_offsets: Vec<f32> = coded().map(Width::level_offset).collect();
        level_offsets.resize(tables.n_coded().next_multiple_of(WIDE), 0.0);
        let sum_of_codes: usize = coded().map(|width| 2 * width.half_levels() - 1).sum();
        let largest_projected = NORM.min(2.14e9 / sum_of_codes.max(1) as f32);
        let (synthesis, level_offsets) = (Lines::from(&synthesis[..]), Lines::from(&level_offsets[..]));
        Self { synthesis, column_units, row_units, level_offsets, mean, largest_projected, places }
    }

    /// Places, padding included.
    pub(crate) fn n_places(&self) -> usize {
        self.places.len()
    }
}

/// q·R(δ)·μ for all tokens of a block, by symmetry in half the multiplications.
///
/// A block of n tokens has the offsets δ = φ − ½ with φ = ±½, ±1½ … With μ' = R(−½)·μ, a pair (a, b) of the query and
/// one (α, β) of μ' give e·cos θφ + o·sin θφ with e = aα + bβ and o = bα − aβ: the first part is even in φ, the second
/// odd. When the query turns to another frame, (e, o) turns like (a, b), so the products are made once for all blocks.
#[derive(Debug, Clone)]
pub(crate) struct MeanTables {
    /// `[n_places]`: μ'.
    turned: Vec<f32>,
    /// `[n_pairs, width]`: cos θφ for φ = ½, 1½ …
    pub(crate) even: Lines<f32>,
    /// `[n_pairs, width]`: sin θφ.
    pub(crate) odd: Lines<f32>,
    /// Pairs, padded to whole vectors of sixteen.
    pub(crate) n_pairs: usize,
    /// Half a block, at least eight.
    pub(crate) width: usize,
}

impl MeanTables {
    fn new(tables: &StreamTables, places: &[usize]) -> Self {
        let inv_freq = tables.rope.as_ref().map_or(&[][..], Rope::inv_freq);
        let (n_pairs, width) = (inv_freq.len().next_multiple_of(WIDE), (tables.block_len / 2).max(LANES));
        let mean_at = |c: &usize| if *c < tables.head_dim { f64::from(tables.mean(*c)) } else { 0.0 };
        let mean: Vec<f64> = places.iter().map(mean_at).collect();
        let mut turned = mean.clone();
        let (mut even, mut odd) = (vec![0.0f32; n_pairs * width], vec![0.0f32; n_pairs * width]);
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
        let (even, odd) = (Lines::from(&even[..]), Lines::from(&odd[..]));
        Self { turned, even, odd, n_pairs, width }
    }
}

/// The component at each place; see [`QueryTables`].
fn places(rope: Option<&Rope>, d: usize) -> Vec<usize> {
    let (pairing, rotary_dim) =
        rope.map_or((Pairing::HalfSplit, 0), |rope| (rope.pairing(), rope.rotary_dim()));
    let (left, right): (Vec<usize>, Vec<usize>) = match pairing {
        Pairing::HalfSplit => ((0..rotary_dim / 2).collect(), (rotary_dim / 2..rotary_dim).collect()),
        Pairing::Interleaved => ((0..rotary_dim).step_by(2).collect(), (1..rotary_dim).step_by(2).collect()),
    };
    let mut places = Vec::new();
    for part in [left, right, (rotary_dim..d).collect()] {
        places.extend(part);
        places.resize(places.len().next_multiple_of(WIDE), d);
    }
    places
}

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
    pub(crate) scaled: Lines<f32>,
    /// `[n, n_pairs]`: e and o of [`MeanTables`], of the scaled queries in the frame of position 0.
    pub(crate) mean_even: Lines<f32>,
    pub(crate) mean_odd: Lines<f32>,
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
        let (d, n_pairs, n_places) = (tables.head_dim, mean.n_pairs, places.len());
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
