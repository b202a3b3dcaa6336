//! Scores in the coefficient domain; see [`crate::attention`] for the formula and [`crate::transform::queries`] for the
//! integers.

use super::frame::{score_mean, turn};
use super::product::dot;
use super::side::{unpack_drift, unpack_sides};
use crate::aligned::Aligned;
use crate::error::Result;
use crate::lanes::{LANES, ROUND, WIDE, groups, groups_mut};
use crate::simd::floats::Floats;
use crate::simd::multiply::{Multiply, on_widest};
use crate::simd::multiply_codes::QUAD;
use crate::transform::queries::Queries;
use crate::transform::query_tables::QueryTables;
use crate::transform::rope::RotationWalk;
use crate::transform::tables::StreamTables;

/// Blocks from a prefetch to the use of it.
const PREFETCH_AHEAD: usize = 2;

/// What scoring one block after another needs.
#[derive(Debug, Default, Clone)]
pub(crate) struct ScoringBuffers {
    /// `[n_queries, n_places]` queries in the block's frame, rounded.
    turned: Aligned<i16>,
    /// `[n_queries, n_pairs]` the queries' products with the mean in the block's frame.
    even: Aligned<f32>,
    odd: Aligned<f32>,
    /// Integer products, before they become something else.
    products: Aligned<i32>,
    /// `[n_queries, n_padded]`: queries times the synthesis; the same rounded, in the order of
    /// [`MultiplyCodes::order_columns`](crate::simd::multiply_codes::MultiplyCodes::order_columns).
    coefficients: Aligned<f32>,
    projected: Aligned<i16>,
    /// `[n_padded]` drift in steps.
    drift: Aligned<f32>,
    /// `[⌈n_coded/4⌉, block_len, 4]` codes of a block.
    quads: Aligned<u8>,
    /// `[n_queries, block_len]` queries times the mean table.
    mean_scores: Aligned<f32>,
    /// `[2, n_queries, width]`: even and odd parts of those scores.
    mean_parts: Aligned<f32>,
    /// `[block_len]` gains and step factors of tokens.
    gains: Aligned<f32>,
    scales: Aligned<f32>,
    /// `[n_queries]`: what the unit of rounded numbers is worth, and what is added to a product with codes to make it one
    /// with levels.
    units: Aligned<f32>,
    offsets: Aligned<f32>,
}

impl ScoringBuffers {
    /// Sizes them for a stream and a number of queries.
    pub(crate) fn fit(&mut self, tables: &StreamTables, n_queries: usize) -> Result<()> {
        let (n, n_padded, what) = (tables.block_len(), tables.n_padded(), "the codec's buffers");
        let query_tables = tables.query_tables();
        self.turned.resize(n_queries * query_tables.n_places(), what)?;
        self.even.resize(n_queries * query_tables.mean.n_pairs, what)?;
        self.odd.resize(n_queries * query_tables.mean.n_pairs, what)?;
        self.products.resize(n_queries * n.max(n_padded), what)?;
        self.coefficients.resize(n_queries * n_padded, what)?;
        self.projected.resize(n_queries * n_padded, what)?;
        self.drift.resize(n_padded, what)?;
        self.quads.resize(tables.n_coded().next_multiple_of(QUAD) * n, what)?;
        self.mean_scores.resize(n_queries * n, what)?;
        self.mean_parts.resize(2 * n_queries * query_tables.mean.width, what)?;
        self.gains.resize(n, what)?;
        self.scales.resize(n, what)?;
        self.units.resize(n_queries, what)?;
        self.offsets.resize(n_queries, what)
    }
}

/// As [`StreamTables::score_blocks`].
#[inline(always)]
pub(crate) fn score<M: Multiply>(
    tables: &StreamTables,
    blocks: &[&[u8]],
    mut walk: Option<&mut RotationWalk>,
    queries: &Queries,
    upcoming: &[&[u8]],
    scores: &mut [f32],
    buffers: &mut ScoringBuffers,
) {
    let (n, n_padded, n_queries) = (tables.block_len(), tables.n_padded(), queries.len());
    let (query_tables, n_tokens) = (tables.query_tables(), blocks.len() * n);
    let ScoringBuffers {
        turned,
        even,
        odd,
        products,
        coefficients,
        projected,
        drift,
        quads,
        mean_scores,
        mean_parts,
        gains,
        scales,
        units,
        offsets,
    } = buffers;
    for b in 0..blocks.len() {
        if b + PREFETCH_AHEAD < blocks.len() {
            prefetch(blocks[b + PREFETCH_AHEAD]);
        }
        if b < upcoming.len() {
            prefetch(upcoming[b]);
        }
        // Without RoPE all blocks share one frame.
        if b == 0 || walk.is_some() {
            let rotation = walk.as_ref().map_or((&[][..], &[][..]), |walk| walk.rotation().padded());
            turn::<M::F32x16>(queries, rotation, turned, even, odd);
            score_mean::<M>(&query_tables.mean, queries, (even, odd), mean_parts, mean_scores, n);
            let (dots, n_places) = (&mut products[..n_queries * n_padded], queries.n_places);
            M::multiply_i16(turned, n_places, &query_tables.synthesis, dots, (n_places, n_padded));
            for q in 0..n_queries {
                let run = q * n_padded..(q + 1) * n_padded;
                (units[q], offsets[q]) = project::<M::F32x16>(
                    &dots[run.clone()],
                    query_tables,
                    &mut coefficients[run.clone()],
                    &mut projected[run],
                );
            }
            M::order_columns(&mut projected[..n_queries * n_padded]);
        }
        let parts = tables.layout.parts(blocks[b]);
        unpack_sides::<M::F32x8>(parts.gain, parts.side, gains, scales);
        unpack_drift(parts.drift, &tables.drift_units, drift);
        M::unpack_quads(&tables.layout, parts.planes, quads);
        let dots = &mut products[..n_queries * n];
        M::multiply_codes(projected, n_padded, quads, dots, (tables.n_coded().next_multiple_of(QUAD), n));
        for q in 0..n_queries {
            let drift_score =
                dot::<M::F32x16, WIDE>(&coefficients[q * n_padded..][..n_padded], &drift[..n_padded]);
            let levels = (&dots[q * n..][..n], offsets[q], units[q]);
            let rest = (&mean_scores[q * n..][..n], drift_score);
            let scores = &mut scores[q * n_tokens + b * n..][..n];
            on_widest!(n, finish_scores::<M>(levels, rest, (gains, scales), queries.factors[q], scores));
        }
        if let Some(walk) = walk.as_deref_mut() {
            walk.advance();
        }
    }
}

/// score = gain · factor · ((product + offset) · step factor · unit + mean's score + drift's score)
#[inline(always)]
fn finish_scores<V: Floats<N>, const N: usize>(
    (dots, offset, unit): (&[i32], f32, f32),
    (means, drift_score): (&[f32], f32),
    (gains, scales): (&[f32], &[f32]),
    factor: f32,
    scores: &mut [f32],
) {
    let scores = groups_mut(scores);
    let n = scores.len();
    let (dots, means) = (&groups(dots)[..n], &groups(means)[..n]);
    let (gains, scales) = (&groups(gains)[..n], &groups(scales)[..n]);
    let (unit, factor, drift_score) = (V::splat(unit), V::splat(factor), V::splat(drift_score));
    let offset = V::splat(offset);
    for g in 0..n {
        let rest = V::load(&means[g]).add(drift_score);
        let levels = V::load_i32(&dots[g]).add(offset);
        let shape = levels.mul_add(V::load(&scales[g]).mul(unit), rest);
        shape.mul(V::load(&gains[g]).mul(factor)).store(&mut scores[g]);
    }
}

/// Asks for bytes that will be read soon. Blocks lie anywhere in memory: without it each would cost a wait.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes.len()).step_by(crate::aligned::LINE_BYTES) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address lies within `bytes`; prefetching has no effect but on caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// One query's products with the columns, as numbers and as integers; of those that meet codes the largest is about
/// ±`largest_projected`. Returns what one is worth, and what is added to a product with codes to make it one with levels.
#[inline(always)]
fn project<V: Floats<WIDE>>(
    products: &[i32],
    tables: &QueryTables,
    coefficients: &mut [f32],
    projected: &mut [i16],
) -> (f32, f32) {
    let products = groups(products);
    let n = products.len();
    let column_units = &groups(&tables.column_units)[..n];
    let plane_units = &groups(&tables.plane_units)[..n];
    let coefficients = &mut groups_mut(coefficients)[..n];
    let mut most = V::splat(0.0);
    for g in 0..n {
        let product = V::load_i32(&products[g]);
        product.mul(V::load(&column_units[g])).store(&mut coefficients[g]);
        most = product.mul(V::load(&plane_units[g])).abs().larger(most);
    }
    let most = most.largest();
    // A query that no column sees: any factor will do.
    let factor = if most > 0.0 { tables.largest_projected / most } else { 0.0 };
    let n = tables.level_offsets.len() / WIDE;
    let (products, plane_units) = (&products[..n], &plane_units[..n]);
    let projected = &mut groups_mut(projected)[..n];
    let level_offsets = &groups(&tables.level_offsets)[..n];
    let (mut offset, factor, round) = (V::splat(0.0), V::splat(factor), V::splat(ROUND));
    for g in 0..n {
        let scaled = V::load_i32(&products[g]).mul(V::load(&plane_units[g])).mul(factor);
        let integers = scaled.add(round).sub(round);
        integers.store_i16(&mut projected[g]);
        offset = integers.mul_add(V::load(&level_offsets[g]), offset);
    }
    (most / tables.largest_projected, offset.total())
}
