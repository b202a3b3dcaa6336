//! The portable text of the kernels. Loops over tokens are innermost and free of branches, for the vectoriser, and
//! there are no closures: the compiler would build them without the caller's instruction set.

use super::Scratch;
use super::f32x8::F32x8;
use super::lanes::{LANES, Lanes, groups, groups_mut, load};
use super::multiply::Multiply;
use crate::basis::StreamTables;
use crate::block::{SIDE_BYTES_PER_TOKEN, pack_row, row_bytes};
use crate::gain::{GUARD_SCALES, gain, gain_code, pack_side};
use crate::reference::{GUARD_CANDIDATES, smallest_safe_guard};
use crate::rope::Rotation;
use crate::width::Width;

/// Turns the block's frame vectors `x`, component-major with `n` tokens.
#[inline(always)]
pub(super) fn rotate<M: Multiply>(rotation: &Rotation, x: &mut [f32], n: usize) {
    rotation.apply_component_major(x, n);
}

/// As [`crate::reference::encode`], from and into the buffers of `scratch`.
#[inline(always)]
pub(super) fn encode<M: Multiply>(tables: &StreamTables, scratch: &mut Scratch, packed: &mut [u8]) {
    let (d, n) = (tables.head_dim, tables.block_len);
    let Scratch { x, z, codes, .. } = scratch;
    M::multiply(&tables.analysis, x, &mut z[..tables.n_coded() * n], (d, n));
    for t in (0..n).step_by(LANES) {
        let mut norms = [0.0f32; LANES];
        for j in 0..d {
            let values = load(x, j * n + t);
            for l in 0..LANES {
                norms[l] = values[l].mul_add(values[l], norms[l]);
            }
        }
        let mut gain_codes = [0u16; LANES];
        let mut inverse_gains = [0.0f32; LANES];
        for l in 0..LANES {
            gain_codes[l] = gain_code(norms[l] / d as f32);
            let gain = gain(gain_codes[l]);
            inverse_gains[l] = if gain > 0.0 { 1.0 / gain } else { 0.0 };
        }
        let guards = normalise_and_guard(tables, z, t, &inverse_gains);
        for l in 0..LANES {
            let side = pack_side(gain_codes[l], guards[l]).to_le_bytes();
            packed[2 * (t + l)..2 * (t + l) + 2].copy_from_slice(&side);
        }
    }

    let (side, mut rows) = packed.split_at_mut(n * SIDE_BYTES_PER_TOKEN);
    // The row loop wants all tokens' step factors at once; x is free by now.
    for (t, word) in side.chunks_exact(2).enumerate() {
        x[t] = 1.0 / GUARD_SCALES[usize::from(u16::from_le_bytes([word[0], word[1]]) >> 12)];
    }
    let inverse_scales = &x[..n];
    for (i, coded) in tables.coded.iter().enumerate() {
        let half = coded.width.half_levels() as f32;
        let z = &z[i * n..(i + 1) * n];
        for t in 0..n {
            let level = (z[t] * inverse_scales[t]).floor();
            codes[t] = (level.max(-half).min(half - 1.0) + half) as i32 as u8;
        }
        let (row, rest) = rows.split_at_mut(row_bytes(coded.width, n));
        pack_row(coded.width, codes, row);
        rows = rest;
    }
}

/// Turns eight tokens' projections into coefficients (in place) and chooses their guard codes.
#[inline(always)]
fn normalise_and_guard(tables: &StreamTables, z: &mut [f32], t: usize, inverse_gains: &Lanes) -> [u8; LANES] {
    let (n, n_coded) = (tables.block_len, tables.n_coded());
    let mut largest = [0.0f32; LANES];
    for i in 0..n_coded {
        let mean = load(&tables.coded_mean, i * n + t);
        let inverse_half = 1.0 / tables.coded[i].width.half_levels() as f32;
        let z = &mut z[i * n + t..i * n + t + LANES];
        for l in 0..LANES {
            z[l] = z[l].mul_add(inverse_gains[l], -mean[l]);
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
            let half = tables.coded[i].width.half_levels() as f32;
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

/// As [`crate::reference::decode`], into `scratch.x`.
#[inline(always)]
pub(super) fn decode<M: Multiply>(tables: &StreamTables, packed: &[u8], scratch: &mut Scratch) {
    let n = tables.block_len;
    let Scratch { x, z, .. } = scratch;
    let (side, rows) = packed.split_at(n * SIDE_BYTES_PER_TOKEN);
    unpack_levels(tables, rows, z);
    M::multiply(&tables.synthesis, z, x, (tables.n_coded(), n));
    let n_groups = n / LANES;
    let (words, x) = (side.as_chunks().0, groups_mut(x));
    let means = groups(&tables.shape_mean);
    for t in 0..n_groups {
        let (gains, scales) = M::F32x8::unpack_sides(&words[t]);
        for j in 0..tables.head_dim {
            let at = j * n_groups + t;
            let shape = M::F32x8::load(&x[at]).mul_add(scales, M::F32x8::load(&means[at]));
            shape.mul(gains).store(&mut x[at]);
        }
    }
}

/// Codes of all coefficients to levels `[n_coded, block_len]`.
#[inline(always)]
fn unpack_levels(tables: &StreamTables, mut rows: &[u8], z: &mut [f32]) {
    let n = tables.block_len;
    for (i, coded) in tables.coded.iter().enumerate() {
        let (row, rest) = rows.split_at(row_bytes(coded.width, n));
        rows = rest;
        let levels = &mut z[i * n..(i + 1) * n];
        // Rows of known length become straight vector code.
        match row.len() {
            8 => unpack_row_levels::<8>(coded.width, row, levels),
            16 => unpack_row_levels::<16>(coded.width, row, levels),
            32 => unpack_row_levels::<32>(coded.width, row, levels),
            64 => unpack_row_levels::<64>(coded.width, row, levels),
            128 => unpack_row_levels::<128>(coded.width, row, levels),
            256 => unpack_row_levels::<256>(coded.width, row, levels),
            4 => unpack_row_levels::<4>(coded.width, row, levels),
            _ => unpack_row_levels::<2>(coded.width, row, levels),
        }
    }
}

/// One row of `BYTES` bytes to its levels, code + (0.5 − half the number of levels).
#[inline(always)]
fn unpack_row_levels<const BYTES: usize>(width: Width, row: &[u8], levels: &mut [f32]) {
    let row: &[u8; BYTES] = row.try_into().expect("the caller matched the length");
    let offset = 0.5 - width.half_levels() as f32;
    let (bits, mask) = (width.bits(), (1u16 << width.bits()).wrapping_sub(1) as u8);
    for (k, run) in levels.chunks_exact_mut(BYTES).enumerate() {
        let run: &mut [f32; BYTES] = run.try_into().expect("a chunk");
        let shift = (k * bits) as u32;
        for j in 0..BYTES {
            run[j] = f32::from((row[j] >> shift) & mask) + offset;
        }
    }
}
