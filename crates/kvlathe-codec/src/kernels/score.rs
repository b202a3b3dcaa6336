//! Scores in the coefficient domain; see [`crate::attend`] for the formula and [`crate::query`] for the integers.

use super::levels::{unpack_pairs, unpack_sides};
use super::multiply::Multiply;
use super::{LANES, ROUND, Scratch};
use crate::basis::StreamTables;
use crate::block::SIDE_BYTES_PER_TOKEN;
use crate::query::Queries;
use crate::rope::{Rotation, RotationWalk};

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
        M::multiply(turned, &query_tables.mean, mean_scores, (d, n));
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
            let (gains, scales) = (&gains[..n], &scales[..n]);
            for t in 0..n {
                let shape = (dots[t] as f32).mul_add(scales[t] * unit, means[t]);
                scores[t] = shape * (gains[t] * factor);
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

/// Rounds values below 2¹⁵ in magnitude to the nearest integers.
#[inline(always)]
fn round_all(values: &[f32], rounded: &mut [i16]) {
    let rounded = &mut rounded[..values.len()];
    for i in 0..values.len() {
        rounded[i] = (values[i] + ROUND).to_bits() as i16;
    }
}

/// One query's products with the columns, to integers of which the largest is ±`largest`; returns what one is worth.
#[inline(always)]
fn project(
    products: &[i32],
    column_units: &[f32],
    largest: f32,
    coefficients: &mut [f32],
    projected: &mut [i16],
) -> f32 {
    let n = products.len();
    let (column_units, coefficients, projected) =
        (&column_units[..n], &mut coefficients[..n], &mut projected[..n]);
    let mut most = [0.0f32; LANES];
    for i in (0..n).step_by(LANES) {
        let (products, units) = (&products[i..i + LANES], &column_units[i..i + LANES]);
        let coefficients = &mut coefficients[i..i + LANES];
        for l in 0..LANES {
            coefficients[l] = products[l] as f32 * units[l];
            most[l] = if coefficients[l].abs() > most[l] { coefficients[l].abs() } else { most[l] };
        }
    }
    let mut magnitude = 0.0f32;
    for l in 0..LANES {
        magnitude = magnitude.max(most[l]);
    }
    // A query that no column sees: any factor will do.
    let factor = if magnitude > 0.0 { largest / magnitude } else { 0.0 };
    for i in 0..n {
        projected[i] = coefficients[i].mul_add(factor, ROUND).to_bits() as i16;
    }
    if magnitude > 0.0 { 1.0 / factor } else { 0.0 }
}

/// Turns queries whose pairs lie half-split.
#[inline(always)]
fn turn(rotation: &Rotation, queries: &[f32], turned: &mut [f32], d: usize) {
    let (cos, sin) = (rotation.cos(), rotation.sin());
    let pairs = cos.len();
    for first in (0..queries.len()).step_by(d) {
        let (from, to) = (&queries[first..first + d], &mut turned[first..first + d]);
        let (a, b, rest) = (&from[..pairs], &from[pairs..2 * pairs], &from[2 * pairs..]);
        let (to_a, to_rest) = to.split_at_mut(pairs);
        let (to_b, to_rest) = to_rest.split_at_mut(pairs);
        let sin = &sin[..pairs];
        for i in 0..pairs {
            to_a[i] = a[i].mul_add(cos[i], -(b[i] * sin[i]));
            to_b[i] = b[i].mul_add(cos[i], a[i] * sin[i]);
        }
        to_rest.copy_from_slice(rest);
    }
}
