//! Scores in the coefficient domain; see [`crate::attend`] for the formula and [`crate::query`] for the integers.

use super::Scratch;
use super::f32x8::F32x8;
use super::frame::{score_mean, turn};
use super::lanes::{groups, groups_mut};
use super::levels::{unpack_pairs, unpack_sides};
use super::multiply::Multiply;
use crate::basis::StreamTables;
use crate::block::SIDE_BYTES_PER_TOKEN;
use crate::query::{Queries, QueryTables};
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
    mut walk: Option<&mut RotationWalk>,
    queries: &Queries,
    upcoming: &[&[u8]],
    scores: &mut [f32],
    scratch: &mut Scratch,
) {
    let (n, n_padded, n_queries) = (tables.block_len, tables.n_padded(), queries.len());
    let (query_tables, n_tokens) = (tables.query_tables(), blocks.len() * n);
    let Scratch {
        turned,
        even,
        odd,
        products,
        projected,
        levels,
        mean_scores,
        mean_parts,
        gains,
        scales,
        units,
        ..
    } = scratch;
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
            turn::<M::F32x8>(queries, rotation, turned, even, odd);
            score_mean::<M>(&query_tables.mean, queries, (even, odd), mean_parts, mean_scores, n);
            let dots = &mut products[..n_queries * n_padded];
            if n_padded > 0 {
                let n_places = queries.n_places;
                M::multiply_i16(turned, n_places, &query_tables.synthesis, dots, (n_places, n_padded));
            }
            for q in 0..n_queries {
                let run = q * n_padded..(q + 1) * n_padded;
                units[q] = project::<M::F32x8>(&dots[run.clone()], query_tables, &mut projected[run]);
            }
        }
        let (side, rows) = blocks[b].split_at(n * SIDE_BYTES_PER_TOKEN);
        unpack_sides::<M::F32x8>(side, gains, scales);
        unpack_pairs(tables, rows, levels);
        let dots = &mut products[..n_queries * n];
        if n_padded > 0 {
            let k = tables.n_coded().next_multiple_of(2);
            M::multiply_i16(projected, n_padded, levels, dots, (k, n));
        } else {
            dots.fill(0);
        }
        for q in 0..n_queries {
            finish_scores::<M::F32x8>(
                (&dots[q * n..][..n], units[q]),
                &mean_scores[q * n..][..n],
                (gains, scales),
                queries.factors[q],
                &mut scores[q * n_tokens + b * n..][..n],
            );
        }
        if let Some(walk) = walk.as_deref_mut() {
            walk.advance();
        }
    }
}

/// score = gain · factor · (product · step factor · unit + mean's score)
#[inline(always)]
fn finish_scores<V: F32x8>(
    (dots, unit): (&[i32], f32),
    means: &[f32],
    (gains, scales): (&[f32], &[f32]),
    factor: f32,
    scores: &mut [f32],
) {
    let scores = groups_mut(scores);
    let n = scores.len();
    let (dots, means) = (&groups(dots)[..n], &groups(means)[..n]);
    let (gains, scales) = (&groups(gains)[..n], &groups(scales)[..n]);
    let (unit, factor) = (V::splat(unit), V::splat(factor));
    for g in 0..n {
        let shape = V::load_i32(&dots[g]).mul_add(V::load(&scales[g]).mul(unit), V::load(&means[g]));
        shape.mul(V::load(&gains[g]).mul(factor)).store(&mut scores[g]);
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

/// One query's products with the columns, to integers of which the largest is about ±`largest_projected`; returns what
/// one is worth.
#[inline(always)]
fn project<V: F32x8>(products: &[i32], tables: &QueryTables, projected: &mut [i16]) -> f32 {
    let products = groups(products);
    let n = products.len();
    let column_units = &groups(&tables.column_units)[..n];
    let mut most = V::splat(0.0);
    for g in 0..n {
        most = V::load_i32(&products[g]).mul(V::load(&column_units[g])).abs().larger(most);
    }
    let most = most.largest();
    // A query that no column sees: any factor will do.
    let factor = if most > 0.0 { tables.largest_projected / most } else { 0.0 };
    let projected = &mut groups_mut(projected)[..n];
    for g in 0..n {
        let coefficients = V::load_i32(&products[g]).mul(V::load(&column_units[g]));
        coefficients.mul(V::splat(factor)).store_i16(&mut projected[g]);
    }
    most / tables.largest_projected
}
