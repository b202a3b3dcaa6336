//! Scores in the coefficient domain; see [`crate::attend`] for the formula and [`crate::query`] for the integers.

use super::frame::{score_mean, turn};
use super::lanes::{LANES, groups, groups_mut, largest_magnitude};
use super::levels::{unpack_pairs, unpack_sides};
use super::multiply::Multiply;
use super::{ROUND, Scratch};
use crate::basis::StreamTables;
use crate::block::SIDE_BYTES_PER_TOKEN;
use crate::query::Queries;
use crate::rope::RotationWalk;

/// Blocks from a prefetch to the use of it.
const PREFETCH_AHEAD: usize = 2;
#[cfg(target_arch = "x86_64")]
const CACHE_LINE_BYTES: usize = 64;

/// As [`StreamTables::score_blocks`].
#[inline(always)]
pub(super) fn score<M: Multiply>(
    tables: &StreamTables,
    blocks: &[&[u8]],
    mut walk: Option<RotationWalk>,
    queries: &Queries,
    upcoming: &[&[u8]],
    scores: &mut [f32],
    scratch: &mut Scratch,
) {
    let (d, n, n_padded) = (tables.head_dim, tables.block_len, tables.n_padded());
    let (query_tables, n_tokens) = (tables.query_tables(), blocks.len() * n);
    let Scratch {
        turned,
        turned_i16,
        products,
        projected,
        levels,
        mean_scores,
        mean_parts,
        gains,
        scales,
        units,
        coefficients,
        ..
    } = scratch;
    let dots = &mut products[..queries.len() * n.max(n_padded)];
    for b in 0..blocks.len() {
        let packed = blocks[b];
        if b + PREFETCH_AHEAD < blocks.len() {
            prefetch(blocks[b + PREFETCH_AHEAD]);
        }
        if b < upcoming.len() {
            prefetch(upcoming[b]);
        }
        match &walk {
            Some(walk) => turn(walk.rotation(), &queries.scaled, turned, d),
            None => turned.copy_from_slice(&queries.scaled),
        }
        score_mean::<M>(&query_tables.mean, turned, mean_parts, mean_scores, (d, n));
        let (side, rows) = packed.split_at(n * SIDE_BYTES_PER_TOKEN);
        if n_padded > 0 {
            round_all(turned, turned_i16);
            let n_products = queries.len() * n_padded;
            M::multiply_i16(turned_i16, d, &query_tables.synthesis, &mut dots[..n_products], (d, n_padded));
            for q in 0..queries.len() {
                let run = q * n_padded..(q + 1) * n_padded;
                units[q] = project(
                    &dots[run.clone()],
                    &query_tables.column_units,
                    query_tables.largest_projected,
                    &mut coefficients[..n_padded],
                    &mut projected[run],
                );
            }
            unpack_pairs(tables, rows, levels);
            let k = tables.n_coded().next_multiple_of(2);
            M::multiply_i16(projected, n_padded, levels, &mut dots[..queries.len() * n], (k, n));
        } else {
            dots.fill(0);
            units.fill(0.0);
        }
        unpack_sides(side, gains, scales);
        for q in 0..queries.len() {
            let (factor, unit) = (queries.factors[q], units[q]);
            let scores = &mut scores[q * n_tokens + b * n..][..n];
            let (dots, means) = (&dots[q * n..][..n], &mean_scores[q * n..][..n]);
            let n = n / LANES;
            let (dots, means) = (&groups(dots)[..n], &groups(means)[..n]);
            let (gains, scales) = (&groups(gains)[..n], &groups(scales)[..n]);
            let scores = &mut groups_mut(scores)[..n];
            for g in 0..n {
                let (dots, means, gains, scales) = (dots[g], means[g], gains[g], scales[g]);
                let mut finished = [0.0; LANES];
                for l in 0..LANES {
                    let shape = (dots[l] as f32).mul_add(scales[l] * unit, means[l]);
                    finished[l] = shape * (gains[l] * factor);
                }
                scores[g] = finished;
            }
        }
        if let Some(walk) = &mut walk {
            walk.advance();
        }
    }
}

/// Asks for bytes that will be read soon. Blocks lie anywhere in memory: without it each would cost a wait.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..bytes.len()).step_by(CACHE_LINE_BYTES) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address lies within `bytes`; prefetching has no effect but on caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Rounds values below 2¹⁵ in magnitude to the nearest integers, a multiple of eight of them.
#[inline(always)]
fn round_all(values: &[f32], rounded: &mut [i16]) {
    let values = groups(values);
    let rounded = &mut groups_mut(rounded)[..values.len()];
    for g in 0..values.len() {
        let (values, mut integers) = (values[g], [0; LANES]);
        for l in 0..LANES {
            integers[l] = (values[l] + ROUND).to_bits() as i16;
        }
        rounded[g] = integers;
    }
}

/// One query's products with the columns, to integers of which the largest is ±`most`; returns what one is worth.
#[inline(always)]
fn project(
    products: &[i32],
    column_units: &[f32],
    most: f32,
    coefficients: &mut [f32],
    projected: &mut [i16],
) -> f32 {
    // Plain loops: vectors are padded to whole registers.
    let n = products.len();
    let (column_units, coefficients, projected) =
        (&column_units[..n], &mut coefficients[..n], &mut projected[..n]);
    for i in 0..n {
        coefficients[i] = products[i] as f32 * column_units[i];
    }
    let magnitude = largest_magnitude(coefficients);
    // A query that no column sees: any factor will do.
    let factor = if magnitude > 0.0 { most / magnitude } else { 0.0 };
    for i in 0..n {
        projected[i] = coefficients[i].mul_add(factor, ROUND).to_bits() as i16;
    }
    if magnitude > 0.0 { 1.0 / factor } else { 0.0 }
}
