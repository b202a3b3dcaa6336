//! Packed rows to levels in 16-bit integers, and side words to numbers.
//!
//! A level is doubled, 2·code + 1 − 2^width, so that it is a whole number.

use crate::basis::StreamTables;
use crate::block::row_bytes;
use crate::gain::unpack_side;
use crate::width::Width;

/// Longest row of codes.
const MAX_BLOCK_LEN: usize = 256;

/// Doubled levels of `bytes` (rows of codes, one or several interleaved), plane after plane, `BYTES` codes each.
#[inline(always)]
fn planes<const BYTES: usize>(width: Width, bytes: &[u8; BYTES], levels: &mut [i16]) {
    match width {
        Width::W0 => {}
        Width::W2 => {
            plane::<BYTES>(bytes, 0, 3, -3, levels, 0);
            plane::<BYTES>(bytes, 2, 3, -3, levels, 1);
            plane::<BYTES>(bytes, 4, 3, -3, levels, 2);
            plane::<BYTES>(bytes, 6, 3, -3, levels, 3);
        }
        Width::W4 => {
            plane::<BYTES>(bytes, 0, 15, -15, levels, 0);
            plane::<BYTES>(bytes, 4, 15, -15, levels, 1);
        }
        Width::W8 => plane::<BYTES>(bytes, 0, 255, -255, levels, 0),
    }
}

/// Run `k` of the levels: codes that lie `shift` bits up in each byte, doubled and offset.
#[inline(always)]
fn plane<const BYTES: usize>(
    bytes: &[u8; BYTES],
    shift: u32,
    mask: u8,
    offset: i16,
    levels: &mut [i16],
    k: usize,
) {
    let run: &mut [i16; BYTES] = (&mut levels[k * BYTES..(k + 1) * BYTES]).try_into().expect("BYTES long");
    for j in 0..BYTES {
        run[j] = i16::from((bytes[j] >> shift) & mask) * 2 + offset;
    }
}

/// One row to `[block_len]` levels.
#[inline(always)]
fn row_levels(width: Width, row: &[u8], levels: &mut [i16]) {
    // Rows of known length become straight vector code.
    macro_rules! by_length {
        ($($length:literal),*) => {
            match row.len() {
                $($length => planes::<$length>(width, row.try_into().expect("matched"), levels),)*
                _ => unreachable!("row lengths are block_len·width/8"),
            }
        };
    }
    by_length!(2, 4, 8, 16, 32, 64, 128, 256);
}

/// Two rows of equal width, interleaved, to `[block_len, 2]` levels.
#[inline(always)]
fn pair_levels(width: Width, even: &[u8], odd: &[u8], levels: &mut [i16]) {
    macro_rules! by_length {
        ($($length:literal),*) => {
            match even.len() {
                $($length => {
                    let (even, odd): (&[u8; $length], &[u8; $length]) =
                        (even.try_into().expect("matched"), odd.try_into().expect("as long"));
                    let mut mixed = [0u8; 2 * $length];
                    interleave_bytes(even, odd, &mut mixed);
                    planes::<{ 2 * $length }>(width, &mixed, levels);
                })*
                _ => unreachable!("row lengths are block_len·width/8"),
            }
        };
    }
    by_length!(2, 4, 8, 16, 32, 64, 128, 256);
}

/// All coefficients of a block to levels `[n_padded/2, block_len, 2]`, for products over coefficients; coefficients
/// beyond the coded ones are zero.
#[inline(always)]
pub(super) fn unpack_pairs(tables: &StreamTables, mut rows: &[u8], levels: &mut [i16]) {
    // Indices instead of iterators here and below: adapters are not compiled for the caller's instruction set.
    let (n, n_coded) = (tables.block_len, tables.n_coded());
    for i in (0..n_coded).step_by(2) {
        let levels = &mut levels[i * n..(i + 2) * n];
        let width = tables.coded[i].width;
        let (even, rest) = rows.split_at(row_bytes(width, n));
        if i + 1 == n_coded {
            let mut row = [0i16; MAX_BLOCK_LEN];
            row_levels(width, even, &mut row[..n]);
            interleave(&row[..n], &[0; MAX_BLOCK_LEN][..n], levels);
            break;
        }
        let next = tables.coded[i + 1].width;
        let (odd, rest) = rest.split_at(row_bytes(next, n));
        rows = rest;
        if width == next {
            pair_levels(width, even, odd, levels);
        } else {
            let (mut a, mut b) = ([0i16; MAX_BLOCK_LEN], [0i16; MAX_BLOCK_LEN]);
            row_levels(width, even, &mut a[..n]);
            row_levels(next, odd, &mut b[..n]);
            interleave(&a[..n], &b[..n], levels);
        }
    }
    levels[n_coded.next_multiple_of(2) * n..].fill(0);
}

/// `mixed` = even[0], odd[0], even[1], odd[1] …
#[inline(always)]
fn interleave_bytes(even: &[u8], odd: &[u8], mixed: &mut [u8]) {
    let n = even.len();
    assert!(odd.len() == n && mixed.len() == 2 * n);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // The compiler makes single inserts of short rows; SSE2, which every x86-64 has, does it in one instruction.
        if n.is_multiple_of(16) {
            for j in (0..n).step_by(16) {
                // SAFETY: j + 16 ≤ n; 2j + 32 ≤ 2n; the lengths are asserted above.
                unsafe {
                    let (a, b) = (
                        _mm_loadu_si128(even.as_ptr().add(j).cast()),
                        _mm_loadu_si128(odd.as_ptr().add(j).cast()),
                    );
                    _mm_storeu_si128(mixed.as_mut_ptr().add(2 * j).cast(), _mm_unpacklo_epi8(a, b));
                    _mm_storeu_si128(mixed.as_mut_ptr().add(2 * j + 16).cast(), _mm_unpackhi_epi8(a, b));
                }
            }
            return;
        }
        if n == 8 {
            // SAFETY: eight bytes are read from each and sixteen written; the lengths are asserted above.
            unsafe {
                let (a, b) = (_mm_loadl_epi64(even.as_ptr().cast()), _mm_loadl_epi64(odd.as_ptr().cast()));
                _mm_storeu_si128(mixed.as_mut_ptr().cast(), _mm_unpacklo_epi8(a, b));
            }
            return;
        }
    }
    for j in 0..n {
        mixed[2 * j] = even[j];
        mixed[2 * j + 1] = odd[j];
    }
}

#[inline(always)]
fn interleave(even: &[i16], odd: &[i16], levels: &mut [i16]) {
    for t in 0..even.len() {
        levels[2 * t] = even[t];
        levels[2 * t + 1] = odd[t];
    }
}

/// One coefficient of several blocks to levels of consecutive tokens; `at` is where its row begins in each block.
#[inline(always)]
pub(super) fn unpack_row_of_blocks(
    width: Width,
    block_len: usize,
    blocks: &[&[u8]],
    at: usize,
    levels: &mut [i16],
) {
    let bytes = row_bytes(width, block_len);
    for b in 0..blocks.len() {
        row_levels(width, &blocks[b][at..at + bytes], &mut levels[b * block_len..(b + 1) * block_len]);
    }
}

/// Gains and step factors of a block's tokens.
#[inline(always)]
pub(super) fn unpack_sides(side: &[u8], gains: &mut [f32], scales: &mut [f32]) {
    let n = side.len() / 2;
    let (gains, scales) = (&mut gains[..n], &mut scales[..n]);
    for t in 0..n {
        (gains[t], scales[t]) = unpack_side(u16::from_le_bytes([side[2 * t], side[2 * t + 1]]));
    }
}
