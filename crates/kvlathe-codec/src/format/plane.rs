//! A plane: the packed codes of one coefficient for all tokens of a block.
//!
//! In a plane of width w, byte j holds the tokens j, j + B·w/8, j + 2·B·w/8 … from its low bits up, so that masking and
//! shifting whole vectors of bytes yields runs of consecutive tokens. A plane of width 3 is one of width 2, the low bits,
//! and one of width 1, the high ones.

use super::width::Width;

/// Bytes of one coefficient's plane.
#[must_use]
pub const fn plane_bytes(width: Width, block_len: usize) -> usize {
    block_len * width.bits() / 8
}

/// Codes of `bits` bits, those of a byte `plane.len()` tokens apart.
#[inline(always)]
fn pack_runs(bits: usize, codes: &[u8], shift: usize, plane: &mut [u8]) {
    let n = plane.len();
    let mask = (1u16 << bits).wrapping_sub(1) as u8;
    plane.fill(0);
    for (k, run) in codes.chunks_exact(n).enumerate() {
        for j in 0..n {
            plane[j] |= ((run[j] >> shift) & mask) << (bits * k);
        }
    }
}

/// Adds what [`pack_runs`] has packed to `codes`.
#[inline(always)]
fn unpack_runs(bits: usize, plane: &[u8], shift: usize, codes: &mut [u8]) {
    let n = plane.len();
    let mask = (1u16 << bits).wrapping_sub(1) as u8;
    for (k, run) in codes.chunks_exact_mut(n).enumerate() {
        for j in 0..n {
            run[j] |= ((plane[j] >> (bits * k)) & mask) << shift;
        }
    }
}

/// Packs one plane: `codes[t]` is the code of token t, below `2^width`.
#[inline(always)]
pub fn pack_plane(width: Width, codes: &[u8], plane: &mut [u8]) {
    match width {
        Width::W0 => {}
        Width::W3 => {
            let (low, high) = plane.split_at_mut(codes.len() / 4);
            pack_runs(2, codes, 0, low);
            pack_runs(1, codes, 2, high);
        }
        Width::W1 | Width::W2 | Width::W4 | Width::W8 => pack_runs(width.bits(), codes, 0, plane),
    }
}

/// Unpacks one plane into `codes`, one byte a token.
#[inline(always)]
pub fn unpack_plane(width: Width, plane: &[u8], codes: &mut [u8]) {
    codes.fill(0);
    match width {
        Width::W0 => {}
        Width::W3 => {
            let (low, high) = plane.split_at(codes.len() / 4);
            unpack_runs(2, low, 0, codes);
            unpack_runs(1, high, 2, codes);
        }
        Width::W1 | Width::W2 | Width::W4 | Width::W8 => unpack_runs(width.bits(), plane, 0, codes),
    }
}
