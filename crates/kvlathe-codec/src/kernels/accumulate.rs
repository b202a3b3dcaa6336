//! Weighted sums in the coefficient domain; see [`crate::attention`] for the formula.

use super::product::dot;
use super::side::{unpack_drift, unpack_sides};
use crate::aligned::Aligned;
use crate::error::Result;
use crate::format::plane::plane_bytes;
use crate::lanes::{LANES, WIDE, groups, groups_mut};
use crate::simd::floats::Floats;
use crate::simd::multiply::{Multiply, on_widest};
use crate::simd::multiply_codes::DOT_STEP;
use crate::transform::sums::CoefficientSums;
use crate::transform::tables::StreamTables;

/// Coefficients that are unpacked and summed together.
const TOGETHER: usize = 4;
/// Σ weight · code stays below 2³¹ when the integer weights sum to less than this: 255 · 8.4 million.
const LARGEST_SUM: f32 = 8.4e6;
/// The largest weight is rounded to this.
const LARGEST_WEIGHT: f32 = 32_700.0;

/// What summing over some blocks needs.
#[derive(Debug, Default, Clone)]
pub(crate) struct SummingBuffers {
    /// `[tokens]` gains and step factors.
    gains: Aligned<f32>,
    scales: Aligned<f32>,
    /// `[n_blocks, n_padded]` drift in steps.
    drift: Aligned<f32>,
    /// `[n_queries, n_blocks]`, then `[n_queries, n_padded]`: weights of blocks, and what their drift adds to sums.
    block_weights: Aligned<f32>,
    drift_sums: Aligned<f32>,
    /// `[n_queries, tokens]`, tokens padded to [`DOT_STEP`]: attention weights times gains and step factors, rounded.
    weights: Aligned<i16>,
    /// `[n_queries]`: what the unit of rounded weights is worth, and their sums.
    units: Aligned<f32>,
    totals: Aligned<i32>,
    /// `[TOGETHER, tokens]` codes of a few coefficients, tokens padded likewise.
    codes: Aligned<u8>,
    /// `[⌈n_coded/4⌉, n_queries, 4]`: products of weights with codes.
    level_dots: Aligned<i32>,
    /// `[n_queries, n_padded]`: vectors of sums of coefficients, but for the mean.
    vectors: Aligned<f32>,
}

impl SummingBuffers {
    /// Sizes them for accumulating.
    pub(crate) fn fit(&mut self, tables: &StreamTables, n_queries: usize, n_blocks: usize) -> Result<()> {
        let (n_tokens, n_padded, what) =
            (n_blocks * tables.block_len(), tables.n_padded(), "the codec's buffers");
        let stride = n_tokens.next_multiple_of(DOT_STEP);
        self.gains.resize(n_tokens, what)?;
        self.scales.resize(n_tokens, what)?;
        self.drift.resize(n_blocks * n_padded, what)?;
        self.block_weights.resize(n_queries * n_blocks, what)?;
        self.drift_sums.resize(n_queries * n_padded, what)?;
        self.weights.resize(n_queries * stride, what)?;
        self.units.resize(n_queries, what)?;
        self.totals.resize(n_queries, what)?;
        self.codes.resize(TOGETHER * stride, what)?;
        self.level_dots.resize(n_queries * tables.n_coded(), what)
    }

    /// Sizes the buffer for turning sums into vectors.
    pub(crate) fn fit_vectors(&mut self, tables: &StreamTables, n_queries: usize) -> Result<()> {
        self.vectors.resize(n_queries * tables.n_padded(), "the codec's buffers")
    }
}

/// As [`StreamTables::accumulate_blocks`].
#[inline(always)]
pub(crate) fn accumulate<M: Multiply>(
    tables: &StreamTables,
    blocks: &[&[u8]],
    weights: &[f32],
    sums: &mut CoefficientSums,
    buffers: &mut SummingBuffers,
) {
    let (d, n_padded, n_queries) = (tables.head_dim(), tables.n_padded(), sums.n_queries());
    let (n, n_coded, n_blocks) = (tables.block_len(), tables.n_coded(), blocks.len());
    let n_tokens = n_blocks * n;
    let stride = n_tokens.next_multiple_of(DOT_STEP);
    let SummingBuffers {
        gains,
        scales,
        drift,
        block_weights,
        drift_sums,
        weights: integer_weights,
        units,
        totals,
        codes,
        level_dots,
        vectors: _,
    } = buffers;
    for b in 0..n_blocks {
        let (parts, run) = (tables.layout.parts(blocks[b]), b * n..(b + 1) * n);
        unpack_sides::<M::F32x8>(parts.gain, parts.side, &mut gains[run.clone()], &mut scales[run]);
        unpack_drift(parts.drift, &tables.drift_units, &mut drift[b * n_padded..(b + 1) * n_padded]);
    }
    let (gains, scales) = (&gains[..n_tokens], &mut scales[..n_tokens]);
    for t in 0..n_tokens {
        scales[t] *= gains[t];
    }
    for q in 0..n_queries {
        let weights = &weights[q * n_tokens..][..n_tokens];
        for b in 0..n_blocks {
            let weight = dot::<M::F32x8, LANES>(&weights[b * n..][..n], &gains[b * n..][..n]);
            block_weights[q * n_blocks + b] = weight;
            sums.mean_weights[q] += weight;
        }
        let integers = &mut integer_weights[q * stride..][..stride];
        units[q] = on_widest!(n, quantise::<M>(weights, scales, integers));
        totals[q] = total(integers);
    }
    let drift_sums = &mut drift_sums[..n_queries * n_padded];
    M::multiply(block_weights, drift, drift_sums, (n_blocks, n_padded));
    for q in 0..n_queries {
        let (sums, more) = (&mut sums.sums[q * d..][..d], &drift_sums[q * n_padded..][..d]);
        for i in 0..d {
            sums[i] += more[i];
        }
    }

    let mut plane_at = tables.layout.planes_at();
    for first in (0..n_coded).step_by(TOGETHER) {
        let together = TOGETHER.min(n_coded - first);
        for i in 0..together {
            let width = tables.layout.widths[first + i];
            let codes = &mut codes[i * stride..][..n_tokens];
            M::unpack_plane_of_blocks(width, n, blocks, plane_at, codes);
            plane_at += plane_bytes(width, n);
        }
        let dots = &mut level_dots[n_queries * first..][..n_queries * together];
        M::dot_codes(integer_weights, codes, dots, (stride, together));
    }
    let whole = n_coded / TOGETHER * TOGETHER;
    for q in 0..n_queries {
        let sums = &mut sums.sums[q * d..][..n_coded];
        let (total, unit) = (totals[q], units[q]);
        let (groups, rest) = sums.as_chunks_mut::<TOGETHER>();
        for (g, sums) in groups.iter_mut().enumerate() {
            let dots = &level_dots[TOGETHER * (n_queries * g + q)..][..TOGETHER];
            add_levels(sums, dots, &tables.half_levels[TOGETHER * g..][..TOGETHER], total, unit);
        }
        let dots = &level_dots[n_queries * whole + q * rest.len()..][..rest.len()];
        add_levels(rest, dots, &tables.half_levels[whole..], total, unit);
    }
}

/// Adds Σ weight · level to sums: a level is its code, less half of all levels, and a half.
#[inline(always)]
fn add_levels(sums: &mut [f32], dots: &[i32], half_levels: &[i32], total: i32, unit: f32) {
    let half_total = 0.5 * total as f32;
    for i in 0..sums.len() {
        let levels = (dots[i] - half_levels[i] * total) as f32 + half_total;
        sums[i] = levels.mul_add(unit, sums[i]);
    }
}

/// The sum of integers that are at least 0 and sum to less than 2³¹.
#[inline(always)]
fn total(integers: &[i16]) -> i32 {
    let mut sum = 0;
    for t in 0..integers.len() {
        sum += i32::from(integers[t]);
    }
    sum
}

/// Rounds weightₜ·scaleₜ to integers; returns what one of (integer · level) is worth.
#[inline(always)]
fn quantise<V: Floats<N>, const N: usize>(weights: &[f32], scales: &[f32], integers: &mut [i16]) -> f32 {
    let (mut most, mut sums) = (V::splat(0.0), V::splat(0.0));
    let weights = groups(weights);
    let n = weights.len();
    let scales = &groups(scales)[..n];
    for g in 0..n {
        let scaled = V::load(&weights[g]).mul(V::load(&scales[g]));
        most = scaled.larger(most);
        sums = sums.add(scaled);
    }
    let (most, sum) = (most.largest(), sums.total());
    let (integers, rest) = integers.split_at_mut(n * N);
    rest.fill(0);
    if !(most > 0.0 && sum.is_finite()) {
        integers.fill(0);
        // NaN weights must not become silent zeros.
        return sum * 0.0;
    }
    // Rounding adds at most a half a token to the sum.
    let factor = (LARGEST_WEIGHT / most).min((LARGEST_SUM - 0.5 * integers.len() as f32) / sum);
    let integers = &mut groups_mut(integers)[..n];
    for g in 0..n {
        let scaled = V::load(&weights[g]).mul(V::load(&scales[g]));
        scaled.mul(V::splat(factor)).store_i16(&mut integers[g]);
    }
    1.0 / factor
}

/// As [`StreamTables::finish_sums`].
#[inline(always)]
pub(crate) fn finish<M: Multiply>(
    tables: &StreamTables,
    sums: &CoefficientSums,
    out: &mut [f32],
    buffers: &mut SummingBuffers,
) {
    let (d, n_padded) = (tables.head_dim(), tables.n_padded());
    let vectors = &mut buffers.vectors[..sums.n_queries() * n_padded];
    M::multiply(&sums.sums, tables.synthesis_rows(), vectors, (d, n_padded));
    for (q, vector) in vectors.chunks_exact(n_padded).enumerate() {
        let (out, mean_weight) = (&mut out[q * d..(q + 1) * d], sums.mean_weights[q]);
        for j in 0..d {
            out[j] += mean_weight.mul_add(tables.mean(j), vector[j]);
        }
    }
}
