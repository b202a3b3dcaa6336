//! Encoding one block.

use super::coding_buffers::CodingBuffers;
use crate::format::drift::{DRIFT_REACH, drift, n_drifting, pack_drift, quantise_drift};
use crate::format::gain::{
    BlockGain, GUARD_CANDIDATES, GUARD_SCALES, gain_code, pack_side, smallest_safe_guard,
};
use crate::format::layout::HEADER_BYTES;
use crate::format::plane::{pack_plane, plane_bytes};
use crate::lanes::{LANES, load, total};
use crate::simd::multiply::Multiply;
use crate::transform::tables::StreamTables;

/// As [`crate::reference::encode`], from `buffers.x`.
#[inline(always)]
pub(crate) fn encode<M: Multiply>(tables: &StreamTables, buffers: &mut CodingBuffers, packed: &mut [u8]) {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let CodingBuffers { x, z, codes, gain_codes, .. } = buffers;
    let (z, gain_codes) = (&mut z[..d * n], &mut gain_codes[..n]);
    M::multiply(&tables.analysis, x, z, (d, n));
    for t in (0..n).step_by(LANES) {
        let mut norms = [0.0f32; LANES];
        for j in 0..d {
            let values = load(x, j * n + t);
            for l in 0..LANES {
                norms[l] = values[l].mul_add(values[l], norms[l]);
            }
        }
        for l in 0..LANES {
            gain_codes[t + l] = gain_code(norms[l] / d as f32);
        }
    }
    let block_gain = BlockGain::of(gain_codes);
    normalise(tables, block_gain, gain_codes, z);

    let (header, rest) = packed.split_at_mut(HEADER_BYTES);
    let (side, rest) = rest.split_at_mut(n);
    let (drift_bytes, mut planes) = rest.split_at_mut(d.div_ceil(2));
    header.copy_from_slice(&block_gain.pack().to_le_bytes());
    take_out_drift(tables, z, n_drifting(gain_codes), &mut codes[..d]);
    pack_drift(&codes[..d], drift_bytes);
    for t in (0..n).step_by(LANES) {
        let guards = choose_guards(tables, z, t);
        for l in 0..LANES {
            side[t + l] = pack_side(block_gain.fall(gain_codes[t + l]), guards[l]);
        }
    }

    // The loop over planes wants all tokens' step factors at once; x is free by now.
    for t in 0..n {
        x[t] = 1.0 / GUARD_SCALES[usize::from(side[t] >> 4)];
    }
    let inverse_scales = &x[..n];
    let codes = &mut codes[..n];
    for i in 0..tables.n_coded() {
        let width = tables.layout.widths[i];
        let half = width.half_levels() as f32;
        let z = &z[i * n..(i + 1) * n];
        for t in 0..n {
            let level = (z[t] * inverse_scales[t]).floor();
            codes[t] = (level.max(-half).min(half - 1.0) + half) as i32 as u8;
        }
        let (plane, rest) = planes.split_at_mut(plane_bytes(width, n));
        pack_plane(width, codes, plane);
        planes = rest;
    }
}

/// Turns projections into coefficients, in place; zero for the zero vector.
#[inline(always)]
fn normalise(tables: &StreamTables, block_gain: BlockGain, gain_codes: &[u16], z: &mut [f32]) {
    let n = tables.block_len();
    for t in (0..n).step_by(LANES) {
        let (mut inverse_gains, mut lives) = ([0.0f32; LANES], [false; LANES]);
        for l in 0..LANES {
            let gain = block_gain.gain(block_gain.fall(gain_codes[t + l]));
            if gain > 0.0 {
                (inverse_gains[l], lives[l]) = (1.0 / gain, true);
            }
        }
        for i in 0..tables.head_dim() {
            let mean = load(&tables.coded_mean, i * n + t);
            let z = &mut z[i * n + t..i * n + t + LANES];
            for l in 0..LANES {
                z[l] = if lives[l] { z[l].mul_add(inverse_gains[l], -mean[l]) } else { 0.0 };
            }
        }
    }
}

/// Takes the drift out of all coefficients `[head_dim, block_len]`, of which `n_drifting` tokens are not zero, and gives
/// its codes.
#[inline(always)]
fn take_out_drift(tables: &StreamTables, z: &mut [f32], n_drifting: usize, codes: &mut [u8]) {
    let n = tables.block_len();
    for i in 0..tables.head_dim() {
        let z = &mut z[i * n..(i + 1) * n];
        let (reach, unit) = (DRIFT_REACH / tables.layout.widths[i].step(), tables.drift_units[i]);
        let mut sums = [0.0f32; LANES];
        for t in (0..n).step_by(LANES) {
            let z = load(z, t);
            for l in 0..LANES {
                sums[l] += z[l].max(-reach).min(reach);
            }
        }
        codes[i] = quantise_drift(total(sums), unit, n_drifting);
        let drift = drift(codes[i], unit);
        for t in 0..n {
            z[t] -= drift;
        }
    }
}

/// The guard codes of eight tokens.
#[inline(always)]
fn choose_guards(tables: &StreamTables, z: &[f32], t: usize) -> [u8; LANES] {
    let (n, n_coded) = (tables.block_len(), tables.n_coded());
    let mut largest = [0.0f32; LANES];
    for i in 0..n_coded {
        let inverse_half = 1.0 / tables.layout.widths[i].half_levels() as f32;
        let z = load(z, i * n + t);
        for l in 0..LANES {
            largest[l] = largest[l].max(z[l].abs() * inverse_half);
        }
    }
    let mut safe = [0u8; LANES];
    for l in 0..LANES {
        safe[l] = smallest_safe_guard(largest[l]);
    }
    let mut best_cost = [f32::INFINITY; LANES];
    let mut best = safe;
    for k in 0..GUARD_CANDIDATES {
        let mut guards = [0u8; LANES];
        let mut scales = [0.0f32; LANES];
        let mut inverse_scales = [0.0f32; LANES];
        for l in 0..LANES {
            guards[l] = safe[l].saturating_sub(k);
            scales[l] = GUARD_SCALES[usize::from(guards[l])];
            inverse_scales[l] = 1.0 / scales[l];
        }
        let mut costs = [0.0f32; LANES];
        for i in 0..n_coded {
            let half = tables.layout.widths[i].half_levels() as f32;
            let step_cost = tables.step_cost[i];
            let z = load(z, i * n + t);
            for l in 0..LANES {
                let level = (z[l] * inverse_scales[l]).floor().max(-half).min(half - 1.0);
                // Written as the decoder computes it, code + (0.5 − half), for equal rounding.
                let error = ((level + half) + (0.5 - half)).mul_add(-scales[l], z[l]);
                costs[l] = (step_cost * error).mul_add(error, costs[l]);
            }
        }
        for l in 0..LANES {
            if costs[l] < best_cost[l] {
                best_cost[l] = costs[l];
                best[l] = guards[l];
            }
        }
    }
    best
}
