//! Scoring and accumulation in the coefficient domain; see [`crate::attend`] for the formulas.

use super::multiply::Multiply;
use super::{LANES, Scratch};
use crate::attend::CoefficientSums;
use crate::basis::StreamTables;
use crate::block::SIDE_BYTES_PER_TOKEN;
use crate::gain::unpack_side;
use crate::kernels::body::{load, unpack_levels};
use crate::rope::Rotation;

/// As [`StreamTables::score_block`].
#[inline(always)]
pub(super) fn score<M: Multiply>(
    tables: &StreamTables,
    packed: &[u8],
    turn_back: Option<&Rotation>,
    queries: &[f32],
    scores: &mut [f32],
    scratch: &mut Scratch,
) {
    let (d, n, n_padded) = (tables.head_dim, tables.block_len, tables.n_padded());
    let Scratch { z, queries: turned, projected, mean_scores, .. } = scratch;
    turned.copy_from_slice(queries);
    if let Some(rotation) = turn_back {
        rotation.apply_row_major(turned, d);
    }
    M::multiply(turned, &tables.shape_mean, mean_scores, (d, n));
    let (side, rows) = packed.split_at(n * SIDE_BYTES_PER_TOKEN);
    if n_padded == 0 {
        scores.fill(0.0);
    } else {
        M::multiply(turned, &tables.query_synthesis, projected, (d, n_padded));
        unpack_levels(tables, rows, z, n_padded);
        M::multiply(projected, z, scores, (n_padded, n));
    }
    for t in (0..n).step_by(LANES) {
        let (gains, scales) = side_of(side, t);
        for q in 0..scores.len() / n {
            let (dots, means) = (load(scores, q * n + t), load(mean_scores, q * n + t));
            for l in 0..LANES {
                scores[q * n + t + l] = dots[l].mul_add(scales[l], means[l]) * gains[l];
            }
        }
    }
}

/// As [`StreamTables::accumulate_block`].
#[inline(always)]
pub(super) fn accumulate<M: Multiply>(
    tables: &StreamTables,
    packed: &[u8],
    weights: &[f32],
    sums: &mut CoefficientSums,
    scratch: &mut Scratch,
) {
    let (n, n_coded) = (tables.block_len, tables.n_coded());
    let Scratch { z, mean_scores: scaled, .. } = scratch;
    let (side, rows) = packed.split_at(n * SIDE_BYTES_PER_TOKEN);
    unpack_levels(tables, rows, z, n_coded);
    for t in (0..n).step_by(LANES) {
        let (gains, scales) = side_of(side, t);
        for q in 0..sums.n_queries {
            let mean_weights = &mut sums.mean_weights[q * LANES..(q + 1) * LANES];
            for l in 0..LANES {
                let weight = weights[q * n + t + l] * gains[l];
                mean_weights[l] += weight;
                scaled[q * n + t + l] = weight * scales[l];
            }
        }
    }
    // Indices instead of iterators: a chain of adapters is not compiled for the caller's instruction set.
    for q in 0..sums.n_queries {
        for i in 0..n_coded {
            let at = (q * n_coded + i) * LANES;
            let mut sum = load(&sums.sums, at);
            for t in (0..n).step_by(LANES) {
                let (weights, levels) = (load(scaled, q * n + t), load(z, i * n + t));
                for l in 0..LANES {
                    sum[l] = weights[l].mul_add(levels[l], sum[l]);
                }
            }
            sums.sums[at..at + LANES].copy_from_slice(&sum);
        }
    }
}

/// Gains and step factors of eight tokens.
#[inline(always)]
fn side_of(side: &[u8], t: usize) -> ([f32; LANES], [f32; LANES]) {
    let mut gains = [0.0f32; LANES];
    let mut scales = [0.0f32; LANES];
    for l in 0..LANES {
        let at = 2 * (t + l);
        (gains[l], scales[l]) = unpack_side(u16::from_le_bytes([side[at], side[at + 1]]));
    }
    (gains, scales)
}
