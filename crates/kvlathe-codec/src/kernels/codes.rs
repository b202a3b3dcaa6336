//! Packed rows to codes, one byte each.
//!
//! The fields of a packed byte are codes of tokens that lie a row's bytes apart, so one shift and one mask over a row give
//! the codes of as many tokens as it has bytes. Rows of one width follow one another: width and length are settled once
//! for a run of rows, and the loops inside are straight vector code. Loops go by index: iterator adapters are not compiled
//! for the caller's instruction set.

use crate::basis::StreamTables;
use crate::block::row_bytes;
use crate::width::Width;

/// Longest row of codes.
const MAX_BLOCK_LEN: usize = 256;
/// Rows that lie interleaved for products over coefficients.
pub(super) const QUAD: usize = 4;

/// How an instruction set unpacks; what it does not say otherwise is the portable text.
pub(super) trait UnpackCodes {
    /// All coefficients of a block to codes `[⌈n_coded/4⌉, block_len, 4]`, for products over coefficients; what makes up a
    /// last quad is zero.
    #[inline(always)]
    fn unpack_quads(tables: &StreamTables, rows: &[u8], codes: &mut [u8]) {
        unpack_quads(tables, rows, codes);
    }

    /// One coefficient of several blocks to codes of consecutive tokens; `at` is where its row begins in each block.
    #[inline(always)]
    fn unpack_row_of_blocks(width: Width, block_len: usize, blocks: &[&[u8]], at: usize, codes: &mut [u8]) {
        unpack_row_of_blocks(width, block_len, blocks, at, codes);
    }
}

impl UnpackCodes for super::multiply::Portable {}
#[cfg(target_arch = "aarch64")]
impl UnpackCodes for super::multiply_neon::Neon {}

/// Calls a function for the block length: its parameters are the bytes of a row of width 1, 2, 4 and 8, and of two and
/// four of 8.
macro_rules! for_block_len {
    ($block_len:expr, $function:ident, $args:tt) => {
        match $block_len {
            8 => for_block_len!(@call $function, (1, 2, 4, 8, 16, 32), $args),
            16 => for_block_len!(@call $function, (2, 4, 8, 16, 32, 64), $args),
            32 => for_block_len!(@call $function, (4, 8, 16, 32, 64, 128), $args),
            64 => for_block_len!(@call $function, (8, 16, 32, 64, 128, 256), $args),
            128 => for_block_len!(@call $function, (16, 32, 64, 128, 256, 512), $args),
            _ => for_block_len!(@call $function, (32, 64, 128, 256, 512, 1024), $args),
        }
    };
    (@call $function:ident, ($b1:literal, $b2:literal, $b4:literal, $b8:literal, $b16:literal, $b32:literal),
     ($($arg:expr),*)) => {
        $function::<$b1, $b2, $b4, $b8, $b16, $b32>($($arg),*)
    };
}

/// A block for each bit of a byte, so that the shifts are constants.
macro_rules! each_bit {
    ($k:ident => $body:block) => {
        each_bit!(@each $k, $body, 0, 1, 2, 3, 4, 5, 6, 7)
    };
    (@each $k:ident, $body:block, $($bit:literal),*) => {
        $({
            const BIT: usize = $bit;
            let $k = BIT;
            $body
        })*
    };
}

/// Codes of width 1: each byte holds eight, `BYTES` apart.
#[inline(always)]
fn codes_of_1<const BYTES: usize>(bytes: &[u8; BYTES], codes: &mut [u8]) {
    let runs = &mut codes.as_chunks_mut::<BYTES>().0[..8];
    each_bit!(k => {
        for j in 0..BYTES {
            runs[k][j] = (bytes[j] >> k) & 1;
        }
    });
}

/// Codes of width 2: each byte holds four, `BYTES` apart.
#[inline(always)]
fn codes_of_2<const BYTES: usize>(bytes: &[u8; BYTES], codes: &mut [u8]) {
    let runs = &mut codes.as_chunks_mut::<BYTES>().0[..4];
    for j in 0..BYTES {
        runs[0][j] = bytes[j] & 3;
    }
    for j in 0..BYTES {
        runs[1][j] = (bytes[j] >> 2) & 3;
    }
    for j in 0..BYTES {
        runs[2][j] = (bytes[j] >> 4) & 3;
    }
    for j in 0..BYTES {
        runs[3][j] = bytes[j] >> 6;
    }
}

/// Codes of width 3: `low` holds two bits of each, as width 2 does, and `high` one, as width 1 does.
#[inline(always)]
fn codes_of_3<const LOW: usize, const HIGH: usize>(low: &[u8; LOW], high: &[u8; HIGH], codes: &mut [u8]) {
    codes_of_2::<LOW>(low, codes);
    let runs = &mut codes.as_chunks_mut::<HIGH>().0[..8];
    each_bit!(k => {
        for j in 0..HIGH {
            runs[k][j] |= ((high[j] >> k) & 1) << 2;
        }
    });
}

/// Codes of width 4: each byte holds two, `BYTES` apart.
#[inline(always)]
fn codes_of_4<const BYTES: usize>(bytes: &[u8; BYTES], codes: &mut [u8]) {
    let runs = &mut codes.as_chunks_mut::<BYTES>().0[..2];
    for j in 0..BYTES {
        runs[0][j] = bytes[j] & 15;
    }
    for j in 0..BYTES {
        runs[1][j] = bytes[j] >> 4;
    }
}

/// The first `N` bytes.
#[inline(always)]
fn first_bytes<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    bytes[..N].try_into().expect("N bytes")
}

/// One row of any width.
#[inline(always)]
fn row_codes<const B1: usize, const B2: usize, const B4: usize, const B8: usize>(
    width: Width,
    row: &[u8],
    codes: &mut [u8],
) {
    let codes = &mut codes[..B8];
    match width {
        Width::W0 => {}
        Width::W1 => codes_of_1::<B1>(first_bytes(row), codes),
        Width::W2 => codes_of_2::<B2>(first_bytes(row), codes),
        Width::W3 => codes_of_3::<B2, B1>(first_bytes(row), first_bytes(&row[B2..]), codes),
        Width::W4 => codes_of_4::<B4>(first_bytes(row), codes),
        Width::W8 => codes.copy_from_slice(first_bytes::<B8>(row)),
    }
}

/// As [`UnpackCodes::unpack_quads`].
#[inline(always)]
pub(super) fn unpack_quads(tables: &StreamTables, rows: &[u8], codes: &mut [u8]) {
    for_block_len!(tables.block_len, unpack_quads_of, (tables, rows, codes));
}

#[inline(always)]
fn unpack_quads_of<
    const B1: usize,
    const B2: usize,
    const B4: usize,
    const B8: usize,
    const B16: usize,
    const B32: usize,
>(
    tables: &StreamTables,
    rows: &[u8],
    codes: &mut [u8],
) {
    let [n8, n4, n3, n2, n1] = tables.rows_of_width;
    let (mut i, mut at) = (0, 0);
    // All coefficients of one width, up to `$end`. Four of them are interleaved as bytes; then they are one row of four times
    // the length. What is left over makes a quad with the next widths' first.
    macro_rules! width {
        ($end:expr, $row:expr, |$rows:ident, $codes:ident| $quad:expr) => {
            let end = $end;
            while i + QUAD <= end {
                let ($rows, $codes) = (&rows[at..at + QUAD * $row], &mut codes[i * B8..(i + QUAD) * B8]);
                $quad;
                (i, at) = (i + QUAD, at + QUAD * $row);
            }
            if i < end {
                at += unlike_quad::<B1, B2, B4, B8>(tables, i, &rows[at..], codes);
                i += QUAD;
            }
        };
    }
    width!(n8, B8, |rows, codes| {
        codes.copy_from_slice(&quad::<B8, B16, B32>(rows, B8));
    });
    width!(n8 + n4, B4, |rows, codes| codes_of_4::<B16>(&quad::<B4, B8, B16>(rows, B4), codes));
    width!(n8 + n4 + n3, B2 + B1, |rows, codes| {
        let low = quad::<B2, B4, B8>(rows, B2 + B1);
        let high = quad::<B1, B2, B4>(&rows[B2..], B2 + B1);
        codes_of_3::<B8, B4>(&low, &high, codes);
    });
    width!(n8 + n4 + n3 + n2, B2, |rows, codes| codes_of_2::<B8>(&quad::<B2, B4, B8>(rows, B2), codes));
    width!(n8 + n4 + n3 + n2 + n1, B1, |rows, codes| codes_of_1::<B4>(&quad::<B1, B2, B4>(rows, B1), codes));
    debug_assert_eq!((i, at), (tables.n_coded().next_multiple_of(QUAD), rows.len()));
}

/// Coefficient `i` and the next three, of different widths or missing; returns the bytes of their rows.
#[inline(always)]
fn unlike_quad<const B1: usize, const B2: usize, const B4: usize, const B8: usize>(
    tables: &StreamTables,
    i: usize,
    rows: &[u8],
    codes: &mut [u8],
) -> usize {
    let mut apart = [[0u8; MAX_BLOCK_LEN]; QUAD];
    let mut at = 0;
    for r in 0..QUAD.min(tables.n_coded() - i) {
        let width = tables.coefficients[i + r].width;
        row_codes::<B1, B2, B4, B8>(width, &rows[at..], &mut apart[r]);
        at += row_bytes(width, B8);
    }
    let codes = &mut codes.as_chunks_mut::<QUAD>().0[i / QUAD * B8..][..B8];
    for t in 0..B8 {
        codes[t] = [apart[0][t], apart[1][t], apart[2][t], apart[3][t]];
    }
    at
}

/// The first `ROW` bytes of four rows that begin `stride` bytes apart, interleaved.
#[inline(always)]
fn quad<const ROW: usize, const TWICE: usize, const FOUR_TIMES: usize>(
    rows: &[u8],
    stride: usize,
) -> [u8; FOUR_TIMES] {
    let even = interleaved::<ROW, TWICE>(first_bytes(rows), first_bytes(&rows[2 * stride..]));
    let odd = interleaved::<ROW, TWICE>(first_bytes(&rows[stride..]), first_bytes(&rows[3 * stride..]));
    interleaved::<TWICE, FOUR_TIMES>(&even, &odd)
}

/// Two rows as even[0], odd[0], even[1], odd[1] …
#[inline(always)]
fn interleaved<const BYTES: usize, const TWICE: usize>(even: &[u8; BYTES], odd: &[u8; BYTES]) -> [u8; TWICE] {
    let mut mixed = [0u8; TWICE];
    assert!(TWICE == 2 * BYTES);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // The compiler makes single inserts of short rows; SSE2, which every x86-64 has, does it in one instruction.
        if BYTES.is_multiple_of(16) {
            for j in (0..BYTES).step_by(16) {
                // SAFETY: j + 16 ≤ BYTES, 2j + 32 ≤ TWICE = 2·BYTES.
                unsafe {
                    let (a, b) = (
                        _mm_loadu_si128(even.as_ptr().add(j).cast()),
                        _mm_loadu_si128(odd.as_ptr().add(j).cast()),
                    );
                    _mm_storeu_si128(mixed.as_mut_ptr().add(2 * j).cast(), _mm_unpacklo_epi8(a, b));
                    _mm_storeu_si128(mixed.as_mut_ptr().add(2 * j + 16).cast(), _mm_unpackhi_epi8(a, b));
                }
            }
            return mixed;
        }
        if BYTES == 8 {
            // SAFETY: eight bytes are read from each row and TWICE = 16 written.
            unsafe {
                let (a, b) = (_mm_loadl_epi64(even.as_ptr().cast()), _mm_loadl_epi64(odd.as_ptr().cast()));
                _mm_storeu_si128(mixed.as_mut_ptr().cast(), _mm_unpacklo_epi8(a, b));
            }
            return mixed;
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::aarch64::*;
        // The compiler zips longer rows by itself; those of eight bytes it takes apart.
        if BYTES == 8 {
            // SAFETY: eight bytes are read from each row and TWICE = 16 written; the target has NEON.
            unsafe {
                let (a, b) = (vld1_u8(even.as_ptr()), vld1_u8(odd.as_ptr()));
                vst1q_u8(mixed.as_mut_ptr(), vcombine_u8(vzip1_u8(a, b), vzip2_u8(a, b)));
            }
            return mixed;
        }
    }
    for j in 0..BYTES {
        mixed[2 * j] = even[j];
        mixed[2 * j + 1] = odd[j];
    }
    mixed
}

/// As [`UnpackCodes::unpack_row_of_blocks`].
#[inline(always)]
pub(super) fn unpack_row_of_blocks(
    width: Width,
    block_len: usize,
    blocks: &[&[u8]],
    at: usize,
    codes: &mut [u8],
) {
    for_block_len!(block_len, unpack_row_of, (width, blocks, at, codes));
}

#[inline(always)]
fn unpack_row_of<
    const B1: usize,
    const B2: usize,
    const B4: usize,
    const B8: usize,
    const B16: usize,
    const B32: usize,
>(
    width: Width,
    blocks: &[&[u8]],
    at: usize,
    codes: &mut [u8],
) {
    // The width is settled outside of the loop.
    macro_rules! each_block {
        ($width:expr) => {
            for b in 0..blocks.len() {
                row_codes::<B1, B2, B4, B8>($width, &blocks[b][at..], &mut codes[b * B8..(b + 1) * B8]);
            }
        };
    }
    match width {
        Width::W0 => {}
        Width::W1 => each_block!(Width::W1),
        Width::W2 => each_block!(Width::W2),
        Width::W3 => each_block!(Width::W3),
        Width::W4 => each_block!(Width::W4),
        Width::W8 => each_block!(Width::W8),
    }
}
