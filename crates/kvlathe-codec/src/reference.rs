//! The scalar encoder and decoder that define the format. Slow and plain; every kernel must give the same bytes.
//!
//! Sums run over components in rising order with fused multiply-adds, so that kernels, which keep that order for each
//! token and put tokens side by side in a vector, agree to the last bit.

use crate::basis::StreamTables;
use crate::block::{SIDE_BYTES_PER_TOKEN, pack_row, row_bytes, unpack_row};
use crate::gain::{GUARD_SCALES, gain, gain_code, pack_side, unpack_side};
use crate::width::Width;

/// How many guard codes the encoder tries a token: the smallest that clips nothing, and those just below it.
pub(crate) const GUARD_CANDIDATES: u8 = 5;

/// Code of a coefficient `z`, in steps, when the token's steps are scaled by `scale`.
fn quantise(z: f32, scale: f32, width: Width) -> u8 {
    let half = width.half_levels() as f32;
    let level = (z * (1.0 / scale)).floor();
    (level.clamp(-half, half - 1.0) + half) as u8
}

/// The level a code stands for, in steps before scaling: the middle of its interval.
fn level(code: u8, width: Width) -> f32 {
    f32::from(code) + (0.5 - width.half_levels() as f32)
}

/// The first guard code under which no coefficient clips (the last one if none).
pub(crate) fn smallest_safe_guard(largest_ratio: f32) -> u8 {
    GUARD_SCALES.iter().position(|&s| s >= largest_ratio).unwrap_or(GUARD_SCALES.len() - 1) as u8
}

/// Encodes `block_len` tokens, component-major (`x[component * block_len + token]`), already in the block's frame.
///
/// Returns the packed block of [`StreamTables::block_bytes`] bytes.
#[must_use]
pub fn encode(tables: &StreamTables, x: &[f32]) -> Vec<u8> {
    let (d, n, n_coded) = (tables.head_dim, tables.block_len, tables.n_coded());
    let mut packed = vec![0; tables.block_bytes()];
    let mut codes = vec![0u8; n_coded * n];
    for t in 0..n {
        let norm_squared = (0..d).fold(0.0f32, |sum, j| x[j * n + t].mul_add(x[j * n + t], sum));
        let gain_code = gain_code(norm_squared / d as f32);
        let gain = gain(gain_code);
        let inverse_gain = if gain > 0.0 { 1.0 / gain } else { 0.0 };

        let z: Vec<f32> = (0..n_coded)
            .map(|i| {
                let dot = (0..d).fold(0.0f32, |sum, j| tables.analysis[i * d + j].mul_add(x[j * n + t], sum));
                dot.mul_add(inverse_gain, -tables.coded_mean[i * n + t])
            })
            .collect();

        // Range guard: try the smallest step factor that clips nothing and a few below, keep the least weighted error.
        let largest_ratio = (0..n_coded)
            .fold(0.0f32, |m, i| m.max(z[i].abs() * (1.0 / tables.coded[i].width.half_levels() as f32)));
        let safe = smallest_safe_guard(largest_ratio);
        let mut best = (f32::INFINITY, safe);
        for k in 0..GUARD_CANDIDATES {
            let guard = safe.saturating_sub(k);
            let scale = GUARD_SCALES[usize::from(guard)];
            let cost = (0..n_coded).fold(0.0f32, |sum, i| {
                let width = tables.coded[i].width;
                let error = level(quantise(z[i], scale, width), width).mul_add(-scale, z[i]);
                (tables.step_cost[i] * error).mul_add(error, sum)
            });
            if cost < best.0 {
                best = (cost, guard);
            }
        }
        let scale = GUARD_SCALES[usize::from(best.1)];
        for i in 0..n_coded {
            codes[i * n + t] = quantise(z[i], scale, tables.coded[i].width);
        }
        packed[2 * t..2 * t + 2].copy_from_slice(&pack_side(gain_code, best.1).to_le_bytes());
    }
    let mut at = n * SIDE_BYTES_PER_TOKEN;
    for (i, coded) in tables.coded.iter().enumerate() {
        let bytes = row_bytes(coded.width, n);
        pack_row(coded.width, &codes[i * n..(i + 1) * n], &mut packed[at..at + bytes]);
        at += bytes;
    }
    packed
}

/// Decodes a packed block to component-major vectors in the block's frame, `[head_dim, block_len]`.
#[must_use]
pub fn decode(tables: &StreamTables, packed: &[u8]) -> Vec<f32> {
    let (d, n, n_coded) = (tables.head_dim, tables.block_len, tables.n_coded());
    let mut levels = vec![0.0f32; n_coded * n];
    let mut codes = vec![0u8; n];
    let mut at = n * SIDE_BYTES_PER_TOKEN;
    for (i, coded) in tables.coded.iter().enumerate() {
        let bytes = row_bytes(coded.width, n);
        unpack_row(coded.width, &packed[at..at + bytes], &mut codes);
        at += bytes;
        for t in 0..n {
            levels[i * n + t] = level(codes[t], coded.width);
        }
    }
    let mut x = vec![0.0f32; d * n];
    for t in 0..n {
        let (gain, scale) = unpack_side(u16::from_le_bytes([packed[2 * t], packed[2 * t + 1]]));
        for j in 0..d {
            let sum = (0..n_coded)
                .fold(0.0f32, |sum, i| tables.synthesis[j * n_coded + i].mul_add(levels[i * n + t], sum));
            x[j * n + t] = sum.mul_add(scale, tables.shape_mean[j * n + t]) * gain;
        }
    }
    x
}
