//! Packed rows to levels in 16-bit integers, and side bytes to numbers.
//!
//! A level is doubled, 2·code + 1 − 2^width, so that it is a whole number. Rows of one width follow one another, so
//! width and length are settled once for a run of rows and the loops inside are straight vector code. Loops go by
//! index: iterator adapters are not compiled for the caller's instruction set.

use super::f32x8::F32x8;
use super::lanes::{LANES, groups_mut};
use crate::basis::{DRIFT_HALF, StreamTables};
use crate::block::row_bytes;
use crate::gain::BlockGain;
use crate::width::Width;

/// Longest row of codes.
const MAX_BLOCK_LEN: usize = 256;

/// Calls a function for the block length: its parameters are the bytes of a row of width 1, 2, 4 and 8, and of two of 8.
macro_rules! for_block_len {
    ($block_len:expr, $function:ident, $args:tt) => {
        match $block_len {
            8 => for_block_len!(@call $function, (1, 2, 4, 8, 16), $args),
            16 => for_block_len!(@call $function, (2, 4, 8, 16, 32), $args),
            32 => for_block_len!(@call $function, (4, 8, 16, 32, 64), $args),
            64 => for_block_len!(@call $function, (8, 16, 32, 64, 128), $args),
            128 => for_block_len!(@call $function, (16, 32, 64, 128, 256), $args),
            _ => for_block_len!(@call $function, (32, 64, 128, 256, 512), $args),
        }
    };
    (@call $function:ident, ($b1:literal, $b2:literal, $b4:literal, $b8:literal, $b16:literal), ($($arg:expr),*)) => {
        $function::<$b1, $b2, $b4, $b8, $b16>($($arg),*)
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

/// Doubled levels of codes of width 1: each byte holds eight, `BYTES` apart.
#[inline(always)]
fn levels_of_1<const BYTES: usize>(bytes: &[u8; BYTES], levels: &mut [i16]) {
    let runs = &mut levels.as_chunks_mut::<BYTES>().0[..8];
    each_bit!(k => {
        for j in 0..BYTES {
            runs[k][j] = i16::from((bytes[j] >> k) & 1) * 2 - 1;
        }
    });
}

/// Doubled levels of codes of width 2: each byte holds four, `BYTES` apart.
#[inline(always)]
fn levels_of_2<const BYTES: usize>(bytes: &[u8; BYTES], levels: &mut [i16]) {
    let (c0, rest) = levels.split_at_mut(BYTES);
    let (c1, rest) = rest.split_at_mut(BYTES);
    let (c2, c3) = rest.split_at_mut(BYTES);
    for j in 0..BYTES {
        c0[j] = i16::from(bytes[j] & 3) * 2 - 3;
        c1[j] = i16::from((bytes[j] >> 2) & 3) * 2 - 3;
        c2[j] = i16::from((bytes[j] >> 4) & 3) * 2 - 3;
        c3[j] = i16::from(bytes[j] >> 6) * 2 - 3;
    }
}

/// Doubled levels of codes of width 3: `low` holds two bits of each, as width 2 does, and `high` one, as width 1 does.
#[inline(always)]
fn levels_of_3<const LOW: usize, const HIGH: usize>(low: &[u8; LOW], high: &[u8; HIGH], levels: &mut [i16]) {
    levels_of_2::<LOW>(low, levels);
    // A set bit is worth four codes, eight doubled levels; its absence takes as much from the middle.
    let runs = &mut levels.as_chunks_mut::<HIGH>().0[..8];
    each_bit!(k => {
        for j in 0..HIGH {
            runs[k][j] += i16::from((high[j] >> k) & 1) * 8 - 4;
        }
    });
}

/// Doubled levels of codes of width 4: each byte holds two, `BYTES` apart.
#[inline(always)]
fn levels_of_4<const BYTES: usize>(bytes: &[u8; BYTES], levels: &mut [i16]) {
    let (c0, c1) = levels.split_at_mut(BYTES);
    for j in 0..BYTES {
        c0[j] = i16::from(bytes[j] & 15) * 2 - 15;
        c1[j] = i16::from(bytes[j] >> 4) * 2 - 15;
    }
}

/// Doubled levels of codes of width 8.
#[inline(always)]
fn levels_of_8<const BYTES: usize>(bytes: &[u8; BYTES], levels: &mut [i16]) {
    for j in 0..BYTES {
        levels[j] = i16::from(bytes[j]) * 2 - 255;
    }
}

/// The first `N` bytes.
#[inline(always)]
fn first_bytes<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    bytes[..N].try_into().expect("N bytes")
}

/// One row of any width.
#[inline(always)]
fn row_levels<const B1: usize, const B2: usize, const B4: usize, const B8: usize, const B16: usize>(
    width: Width,
    row: &[u8],
    levels: &mut [i16],
) {
    let levels = &mut levels[..B8];
    match width {
        Width::W0 => {}
        Width::W1 => levels_of_1::<B1>(first_bytes(row), levels),
        Width::W2 => levels_of_2::<B2>(first_bytes(row), levels),
        Width::W3 => levels_of_3::<B2, B1>(first_bytes(row), first_bytes(&row[B2..]), levels),
        Width::W4 => levels_of_4::<B4>(first_bytes(row), levels),
        Width::W8 => levels_of_8::<B8>(first_bytes(row), levels),
    }
}

/// All coefficients of a block to levels `[⌈n_coded/2⌉, block_len, 2]`, for products over coefficients; what makes up a
/// last pair is zero.
#[inline(always)]
pub(super) fn unpack_pairs(tables: &StreamTables, rows: &[u8], levels: &mut [i16]) {
    for_block_len!(tables.block_len, unpack_pairs_of, (tables, rows, levels));
}

#[inline(always)]
fn unpack_pairs_of<const B1: usize, const B2: usize, const B4: usize, const B8: usize, const B16: usize>(
    tables: &StreamTables,
    rows: &[u8],
    levels: &mut [i16],
) {
    let [n8, n4, n3, n2, n1] = tables.rows_of_width;
    let (mut i, mut at) = (0, 0);
    // All coefficients of one width, up to `$end`. Pairs of them are interleaved as bytes; then they are rows of twice the
    // length. What is left over makes a pair with the next width's first.
    macro_rules! width {
        ($end:expr, $row:expr, $pair:expr) => {
            let end = $end;
            while i + 2 <= end {
                $pair(&rows[at..], &mut levels[i * B8..(i + 2) * B8]);
                (i, at) = (i + 2, at + 2 * $row);
            }
            if i < end {
                at += unlike_pair::<B1, B2, B4, B8, B16>(tables, i, &rows[at..], levels);
                i += 2;
            }
        };
    }
    width!(n8, B8, pair_of_8::<B8, B16>);
    width!(n8 + n4, B4, pair_of_4::<B4, B8>);
    width!(n8 + n4 + n3, B2 + B1, pair_of_3::<B1, B2, B4>);
    width!(n8 + n4 + n3 + n2, B2, pair_of_2::<B2, B4>);
    width!(n8 + n4 + n3 + n2 + n1, B1, pair_of_1::<B1, B2>);
    debug_assert_eq!((i, at), (tables.n_coded().next_multiple_of(2), rows.len()));
}

/// Defines a pair of rows of one width: interleaved as bytes they are one row of twice the length.
macro_rules! pair {
    ($name:ident, $levels_of:ident) => {
        #[inline(always)]
        fn $name<const ROW: usize, const TWICE: usize>(rows: &[u8], levels: &mut [i16]) {
            $levels_of::<TWICE>(
                &interleaved::<ROW, TWICE>(first_bytes(rows), first_bytes(&rows[ROW..])),
                levels,
            );
        }
    };
}
pair!(pair_of_8, levels_of_8);
pair!(pair_of_4, levels_of_4);
pair!(pair_of_2, levels_of_2);
pair!(pair_of_1, levels_of_1);

/// As the others; low and high bits are interleaved apart. `B1` and `B2` are the bytes of rows of these widths.
#[inline(always)]
fn pair_of_3<const B1: usize, const B2: usize, const B4: usize>(rows: &[u8], levels: &mut [i16]) {
    let (even, odd) = rows.split_at(B1 + B2);
    let low = interleaved::<B2, B4>(first_bytes(even), first_bytes(odd));
    let high = interleaved::<B1, B2>(first_bytes(&even[B2..]), first_bytes(&odd[B2..]));
    levels_of_3::<B4, B2>(&low, &high, levels);
}

/// Coefficient `i` and the next, of another width or missing; returns the bytes of their rows.
#[inline(always)]
fn unlike_pair<const B1: usize, const B2: usize, const B4: usize, const B8: usize, const B16: usize>(
    tables: &StreamTables,
    i: usize,
    rows: &[u8],
    levels: &mut [i16],
) -> usize {
    let (mut even, mut odd) = ([0i16; MAX_BLOCK_LEN], [0i16; MAX_BLOCK_LEN]);
    let width = tables.coefficients[i].width;
    row_levels::<B1, B2, B4, B8, B16>(width, rows, &mut even);
    let mut bytes = row_bytes(width, B8);
    if i + 1 < tables.n_coded() {
        let next = tables.coefficients[i + 1].width;
        row_levels::<B1, B2, B4, B8, B16>(next, &rows[bytes..], &mut odd);
        bytes += row_bytes(next, B8);
    }
    let levels = &mut levels[i * B8..(i + 2) * B8];
    for t in 0..B8 {
        levels[2 * t] = even[t];
        levels[2 * t + 1] = odd[t];
    }
    bytes
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

/// One coefficient of several blocks to levels of consecutive tokens; `at` is where its row begins in each block.
#[inline(always)]
pub(super) fn unpack_row_of_blocks(
    width: Width,
    block_len: usize,
    blocks: &[&[u8]],
    at: usize,
    levels: &mut [i16],
) {
    for_block_len!(block_len, unpack_row_of, (width, blocks, at, levels));
}

#[inline(always)]
fn unpack_row_of<const B1: usize, const B2: usize, const B4: usize, const B8: usize, const B16: usize>(
    width: Width,
    blocks: &[&[u8]],
    at: usize,
    levels: &mut [i16],
) {
    // The width is settled outside of the loop.
    macro_rules! each_block {
        ($width:expr) => {
            for b in 0..blocks.len() {
                row_levels::<B1, B2, B4, B8, B16>(
                    $width,
                    &blocks[b][at..],
                    &mut levels[b * B8..(b + 1) * B8],
                );
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

/// Gains and step factors of a block's tokens.
#[inline(always)]
pub(super) fn unpack_sides<V: F32x8>(block: BlockGain, side: &[u8], gains: &mut [f32], scales: &mut [f32]) {
    let sides = side.as_chunks::<LANES>().0;
    let n = sides.len();
    let (gains, scales) = (&mut groups_mut(gains)[..n], &mut groups_mut(scales)[..n]);
    for g in 0..n {
        let (of_group, factors) = V::unpack_sides(block, &sides[g]);
        of_group.store(&mut gains[g]);
        factors.store(&mut scales[g]);
    }
}

/// The drift of all coefficients, in their steps; `units` and `drift` are padded with zeros to whole vectors.
#[inline(always)]
pub(super) fn unpack_drift(packed: &[u8], units: &[f32], drift: &mut [f32]) {
    let n = packed.len();
    let (low, high) = drift[..units.len()].split_at_mut(n);
    let (low_units, high_units) = units.split_at(n);
    for j in 0..n {
        low[j] = (i32::from(packed[j] & 15) - DRIFT_HALF as i32) as f32 * low_units[j];
    }
    let n = n.min(high.len());
    let (high, rest) = high.split_at_mut(n);
    let high_units = &high_units[..n];
    for j in 0..n {
        high[j] = (i32::from(packed[j] >> 4) - DRIFT_HALF as i32) as f32 * high_units[j];
    }
    rest.fill(0.0);
}
