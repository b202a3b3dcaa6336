//! What scoring needs of a stream; see [`super::queries`] for the integers.

use super::rope::{Pairing, Rope};
use crate::aligned::Aligned;
use crate::format::layout::Layout;
use crate::format::width::Width;
use crate::lanes::{LANES, WIDE};

/// Norm of scaled queries and synthesis columns: rounding to integers keeps their entries within 16 bits.
pub(super) const NORM: f32 = 32_700.0;

/// What scoring needs of a stream. Components stand at *places*: first those that turn to the left, then their partners,
/// then the rest, each of the three padded with zeros to whole vectors of sixteen.
#[derive(Debug, Clone)]
pub(crate) struct QueryTables {
    /// `[n_places/2, n_padded, 2]`: columns of V times their step, each scaled to norm [`NORM`] and rounded.
    pub(crate) synthesis: Aligned<i16>,
    /// `[n_padded]`: what a product of a column with a query of norm [`NORM`] is worth.
    pub(crate) column_units: Aligned<f32>,
    /// `[n_padded]`: the same, and zero for coefficients without a plane.
    pub(crate) plane_units: Aligned<f32>,
    /// [`Width::level_offset`] of coefficients with a plane, padded with zeros
    /// to whole vectors of sixteen.
    pub(crate) level_offsets: Aligned<f32>,
    /// The mean's part of scores.
    pub(crate) mean: MeanTables,
    /// What the largest product of a query is rounded to; Σ |product|·code then stays below 2³¹.
    pub(crate) largest_projected: f32,
    /// The component at each place; `head_dim` where it is padding.
    pub(super) places: Vec<usize>,
}

impl QueryTables {
    /// `synthesis` is `[head_dim, head_dim]`, columns of V times their step; `mean` is that of the shape at a block's
    /// middle.
    pub(super) fn new(layout: &Layout, synthesis: &[f32], mean: &[f32], rope: Option<&Rope>) -> Self {
        let (d, n_coded) = (layout.head_dim, layout.n_coded());
        let n_padded = d.next_multiple_of(WIDE);
        let places = places(rope, d);
        let mean = MeanTables::new(layout.block_len, mean, rope, &places);
        let norms: Vec<f32> =
            (0..d).map(|i| (0..d).map(|j| synthesis[j * d + i].powi(2)).sum::<f32>().sqrt()).collect();

        let mut columns = vec![0i16; places.len() * n_padded];
        for (place, component) in places.iter().copied().enumerate().filter(|(_, c)| *c < d) {
            for (i, norm) in norms.iter().enumerate().filter(|(_, norm)| **norm > 0.0) {
                let value = synthesis[component * d + i] * (NORM / norm);
                columns[(place / 2 * n_padded + i) * 2 + place % 2] = value.round() as i16;
            }
        }
        let mut column_units: Vec<f32> = norms.iter().map(|norm| norm / NORM).collect();
        column_units.resize(n_padded, 0.0);
        let mut plane_units = column_units.clone();
        plane_units[n_coded..].fill(0.0);
        let [column_units, plane_units] = [column_units, plane_units].map(|units| Aligned::from(&units[..]));
        let coded = || layout.widths[..n_coded].iter().copied();
        let mut level_offsets: Vec<f32> = coded().map(Width::level_offset).collect();
        level_offsets.resize(n_coded.next_multiple_of(WIDE), 0.0);
        let sum_of_codes: usize = coded().map(|width| 2 * width.half_levels() - 1).sum();
        let largest_projected = NORM.min(2.14e9 / sum_of_codes.max(1) as f32);
        let (synthesis, level_offsets) = (Aligned::from(&columns[..]), Aligned::from(&level_offsets[..]));
        Self { synthesis, column_units, plane_units, level_offsets, mean, largest_projected, places }
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
    pub(super) turned: Vec<f32>,
    /// `[n_pairs, width]`: cos θφ for φ = ½, 1½ …
    pub(crate) even: Aligned<f32>,
    /// `[n_pairs, width]`: sin θφ.
    pub(crate) odd: Aligned<f32>,
    /// Pairs, padded to whole vectors of sixteen.
    pub(crate) n_pairs: usize,
    /// Half a block, at least eight.
    pub(crate) width: usize,
}

impl MeanTables {
    fn new(block_len: usize, mean: &[f32], rope: Option<&Rope>, places: &[usize]) -> Self {
        let inv_freq = rope.map_or(&[][..], Rope::inv_freq);
        let (n_pairs, width) = (inv_freq.len().next_multiple_of(WIDE), (block_len / 2).max(LANES));
        let mean_at = |c: &usize| mean.get(*c).map_or(0.0, |value| f64::from(*value));
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
        let (even, odd) = (Aligned::from(&even[..]), Aligned::from(&odd[..]));
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
