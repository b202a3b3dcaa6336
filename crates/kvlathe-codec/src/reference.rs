//! The scalar encoder and decoder that define the format. Slow and plain; every kernel must give the same bytes.
//!
//! Sums run over components in rising order with fused multiply-adds, so that kernels, which keep that order for each
//! token and put tokens side by side in a vector, agree to the last bit.

use crate::format::drift::{DRIFT_REACH, drift, drift_code, n_drifting, pack_drift, quantise_drift};
use crate::format::gain::{
    BlockGain, GUARD_CANDIDATES, GUARD_SCALES, gain_code, pack_side, smallest_safe_guard,
};
use crate::format::layout::HEADER_BYTES;
use crate::format::plane::{pack_plane, plane_bytes, unpack_plane};
use crate::format::width::Width;
use crate::transform::tables::StreamTables;

/// Partial sums of a block's drift: token t adds to sum t mod 8.
const DRIFT_SUMS: usize = 8;

/// Code of a coefficient `z`, in steps, when the token's steps are scaled by `scale`.
fn quantise(z: f32, scale: f32, width: Width) -> u8 {
    let half = width.half_levels() as f32;
    let level = (z * (1.0 / scale)).floor();
    (level.clamp(-half, half - 1.0) + half) as u8
}

/// The level a code stands for, in steps before scaling: the middle of its interval.
fn level(code: u8, width: Width) -> f32 {
    f32::from(code) + width.level_offset()
}

/// Encodes `block_len` tokens, component-major (`x[component * block_len + token]`), already in the block's frame.
///
/// Returns the packed block of [`StreamTables::block_bytes`] bytes.
#[must_use]
pub fn encode(tables: &StreamTables, x: &[f32]) -> Vec<u8> {
    let widths = &tables.layout.widths;
    let (d, n, n_coded) = (tables.head_dim(), tables.block_len(), tables.n_coded());
    let mut packed = vec![0; tables.block_bytes()];
    let gain_codes: Vec<u16> = (0..n)
        .map(|t| {
            let norm_squared = (0..d).fold(0.0f32, |sum, j| x[j * n + t].mul_add(x[j * n + t], sum));
            gain_code(norm_squared / d as f32)
        })
        .collect();
    let block_gain = BlockGain::of(&gain_codes);

    // Coefficients in steps, z[i * n + t].
    let mut z = vec![0.0f32; d * n];
    for t in 0..n {
        let gain = block_gain.gain(block_gain.fall(gain_codes[t]));
        if gain == 0.0 {
            continue;
        }
        for i in 0..d {
            let dot = (0..d).fold(0.0f32, |sum, j| tables.analysis[i * d + j].mul_add(x[j * n + t], sum));
            z[i * n + t] = dot.mul_add(1.0 / gain, -tables.coded_mean[i * n + t]);
        }
    }

    // Drift: what the block's tokens have in common.
    let n_drifting = n_drifting(&gain_codes);
    let mut drift_codes = vec![0u8; d];
    for (i, z) in z.chunks_exact_mut(n).enumerate() {
        let reach = DRIFT_REACH / widths[i].step();
        let mut sums = [0.0f32; DRIFT_SUMS];
        for (t, z) in z.iter().enumerate() {
            sums[t % DRIFT_SUMS] += z.max(-reach).min(reach);
        }
        let [a, b, c, d, e, f, g, h] = sums;
        let (sum, unit) = (((a + e) + (c + g)) + ((b + f) + (d + h)), tables.drift_units[i]);
        drift_codes[i] = quantise_drift(sum, unit, n_drifting);
        z.iter_mut().for_each(|z| *z -= drift(drift_codes[i], unit));
    }

    let mut codes = vec![0u8; n_coded * n];
    for t in 0..n {
        // Range guard: try the smallest step factor that clips nothing and a few below, keep the least weighted error.
        let largest_ratio = (0..n_coded)
            .fold(0.0f32, |m, i| m.max(z[i * n + t].abs() * (1.0 / widths[i].half_levels() as f32)));
        let safe = smallest_safe_guard(largest_ratio);
        let mut best = (f32::INFINITY, safe);
        for k in 0..GUARD_CANDIDATES {
            let guard = safe.saturating_sub(k);
            let scale = GUARD_SCALES[usize::from(guard)];
            let cost = (0..n_coded).fold(0.0f32, |sum, i| {
                let (z, width) = (z[i * n + t], widths[i]);
                let error = level(quantise(z, scale, width), width).mul_add(-scale, z);
                (tables.step_cost[i] * error).mul_add(error, sum)
            });
            if cost < best.0 {
                best = (cost, guard);
            }
        }
        let scale = GUARD_SCALES[usize::from(best.1)];
        for i in 0..n_coded {
            codes[i * n + t] = quantise(z[i * n + t], scale, widths[i]);
        }
        packed[HEADER_BYTES + t] = pack_side(block_gain.fall(gain_codes[t]), best.1);
    }

    packed[..HEADER_BYTES].copy_from_slice(&block_gain.pack().to_le_bytes());
    let mut at = tables.layout.planes_at();
    pack_drift(&drift_codes, &mut packed[HEADER_BYTES + n..at]);
    for i in 0..n_coded {
        let width = widths[i];
        let bytes = plane_bytes(width, n);
        pack_plane(width, &codes[i * n..(i + 1) * n], &mut packed[at..at + bytes]);
        at += bytes;
    }
    packed
}

/// Decodes a packed block to component-major vectors in the block's frame, `[head_dim, block_len]`.
#[must_use]
pub fn decode(tables: &StreamTables, packed: &[u8]) -> Vec<f32> {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let parts = tables.layout.parts(packed);
    let (gains, scales): (Vec<f32>, Vec<f32>) =
        parts.side.iter().map(|&side| parts.gain.unpack_side(side)).unzip();
    let mut z = vec![0.0f32; d * n];
    let mut codes = vec![0u8; n];
    let mut at = 0;
    for (i, z) in z.chunks_exact_mut(n).enumerate() {
        let width = tables.layout.widths[i];
        let drift = drift(drift_code(parts.drift, i), tables.drift_units[i]);
        if width == Width::W0 {
            z.fill(drift);
            continue;
        }
        let bytes = plane_bytes(width, n);
        unpack_plane(width, &parts.planes[at..at + bytes], &mut codes);
        at += bytes;
        for t in 0..n {
            z[t] = level(codes[t], width).mul_add(scales[t], drift);
        }
    }
    let mut x = vec![0.0f32; d * n];
    for t in 0..n {
        for j in 0..d {
            let sum = (0..d).fold(0.0f32, |sum, i| tables.synthesis[j * d + i].mul_add(z[i * n + t], sum));
            x[j * n + t] = (sum + tables.shape_mean[j * n + t]) * gains[t];
        }
    }
    x
}
