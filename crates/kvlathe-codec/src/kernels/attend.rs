//! Scoring and accumulation in the coefficient domain; see [`crate::attend`] for the formulas.

use super::multiply::Multiply;
use super::{LANES, Scratch};
use crate::attend::CoefficientSums;
use crate::basis::StreamTables;
use crate::block::SIDE_BYTES_PER_TOKEN;
use crate::gain::unpack_side;
use crate::kernels::body::unpack_levels;
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
    let Scratch { z, codes, queries: turned, projected, mean_scores, .. } = scratch;
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
        unpack_levels(tables, rows, z, codes, n_padded);
        M::multiply(projected, z, scores, (n_padded, n));
    }
    for t in (0..n).step_by(LANES) {
        let (gains, scales) = side_of(side, t);
        for (scores, means) in scores.chunks_exact_mut(n).zip(mean_scores.chunks_exact(n)) {
            for l in 0..LANES {
                scores[t + l] = scores[t + l].mul_add(scales[l], means[t + l]) * gains[l];
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
    let Scratch { z, codes, x: scaled, .. } = scratch;
    let (side, rows) = packed.split_at(n * SIDE_BYTES_PER_TOKEN);
    unpack_levels(tables, rows, z, codes, n_coded);
    for (q, weights) in weights.chunks_exact(n).enumerate() {
        let mean_weights = &mut sums.mean_weights[q * LANES..(q + 1) * LANES];
        let scaled = &mut scaled[..n];
        for t in (0..n).step_by(LANES) {
            let (gains, scales) = side_of(side, t);
            for l in 0..LANES {
                let weight = weights[t + l] * gains[l];
                mean_weights[l] += weight;
                scaled[t + l] = weight * scales[l];
            }
        }
        let sums = &mut sums.sums[q * n_coded * LANES..(q + 1) * n_coded * LANES];
        for (sums, levels) in sums.chunks_exact_mut(LANES).zip(z.chunks_exact(n)) {
            for (scaled, levels) in scaled.chunks_exact(LANES).zip(levels.chunks_exact(LANES)) {
                for l in 0..LANES {
                    sums[l] = scaled[l].mul_add(levels[l], sums[l]);
                }
            }
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
