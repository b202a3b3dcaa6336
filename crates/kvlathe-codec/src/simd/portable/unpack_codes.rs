//! Packed planes to codes, one byte each.
//!
//! The fields of a packed byte are codes of tokens that lie a plane's bytes apart, so one shift and one mask over a plane give
//! the codes of as many tokens as it has bytes. Planes of one width follow one another: width and length are settled once
//! for a run of planes, and the loops inside are straight vector code. Loops go by index: iterator adapters are not compiled
//! for the caller's instruction set.

use crate::format::layout::Layout;
use crate::format::plane::plane_bytes;
use crate::format::width::Width;
use crate::simd::isa::Portable;
use crate::simd::multiply_codes::QUAD;
use crate::simd::unpack_codes::UnpackCodes;

/// Longest plane of codes.
const MAX_BLOCK_LEN: usize = 256;

/// Calls a function for the block length: its parameters are the bytes of a plane of width 1, 2, 4 and 8, and of two and
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

/// One plane of any width.
#[inline(always)]
fn plane_codes<const B1: usize, const B2: usize, const B4: usize, const B8: usize>(
    width: Width,
    plane: &[u8],
    codes: &mut [u8],
) {
    let codes = &mut codes[..B8];
    match width {
        Width::W0 => {}
        Width::W1 => codes_of_1::<B1>(first_bytes(plane), codes),
        Width::W2 => codes_of_2::<B2>(first_bytes(plane), codes),
        Width::W3 => codes_of_3::<B2, B1>(first_bytes(plane), first_bytes(&plane[B2..]), codes),
        Width::W4 => codes_of_4::<B4>(first_bytes(plane), codes),
        Width::W8 => codes.copy_from_slice(first_bytes::<B8>(plane)),
    }
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
    layout: &Layout,
    planes: &[u8],
    codes: &mut [u8],
) {
    let [n8, n4, n3, n2, n1] = layout.planes_of_width;
    let (mut i, mut at) = (0, 0);
    // All coefficients of one width, up to `$end`. Four of them are interleaved as bytes; then they are one plane of four times
    // the length. What is left over makes a quad with the next widths' first.
    macro_rules! width {
        ($end:expr, $plane:expr, |$planes:ident, $codes:ident| $quad:expr) => {
            let end = $end;
            while i + QUAD <= end {
                let ($planes, $codes) =
                    (&planes[at..at + QUAD * $plane], &mut codes[i * B8..(i + QUAD) * B8]);
                $quad;
                (i, at) = (i + QUAD, at + QUAD * $plane);
            }
            if i < end {
                at += unlike_quad::<B1, B2, B4, B8>(layout, i, &planes[at..], codes);
                i += QUAD;
            }
        };
    }
    width!(n8, B8, |planes, codes| {
        codes.copy_from_slice(&quad::<B8, B16, B32>(planes, B8));
    });
    width!(n8 + n4, B4, |planes, codes| codes_of_4::<B16>(&quad::<B4, B8, B16>(planes, B4), codes));
    width!(n8 + n4 + n3, B2 + B1, |planes, codes| {
        let low = quad::<B2, B4, B8>(planes, B2 + B1);
        let high = quad::<B1, B2, B4>(&planes[B2..], B2 + B1);
        codes_of_3::<B8, B4>(&low, &high, codes);
    });
    width!(n8 + n4 + n3 + n2, B2, |planes, codes| codes_of_2::<B8>(&quad::<B2, B4, B8>(planes, B2), codes));
    width!(n8 + n4 + n3 + n2 + n1, B1, |planes, codes| codes_of_1::<B4>(
        &quad::<B1, B2, B4>(planes, B1),
        codes
    ));
    debug_assert_eq!((i, at), (layout.n_coded().next_multiple_of(QUAD), planes.len()));
}

/// Coefficient `i` and the next three, of different widths or missing; returns the bytes of their planes.
#[inline(always)]
fn unlike_quad<const B1: usize, const B2: usize, const B4: usize, const B8: usize>(
    layout: &Layout,
    i: usize,
    planes: &[u8],
    codes: &mut [u8],
) -> usize {
    let mut apart = [[0u8; MAX_BLOCK_LEN]; QUAD];
    let mut at = 0;
    for r in 0..QUAD.min(layout.n_coded() - i) {
        let width = layout.widths[i + r];
        plane_codes::<B1, B2, B4, B8>(width, &planes[at..], &mut apart[r]);
        at += plane_bytes(width, B8);
    }
    let codes = &mut codes.as_chunks_mut::<QUAD>().0[i / QUAD * B8..][..B8];
    for t in 0..B8 {
        codes[t] = [apart[0][t], apart[1][t], apart[2][t], apart[3][t]];
    }
    at
}

/// The first `PLANE` bytes of four planes that begin `stride` bytes apart, interleaved.
#[inline(always)]
fn quad<const PLANE: usize, const TWICE: usize, const FOUR_TIMES: usize>(
    planes: &[u8],
    stride: usize,
) -> [u8; FOUR_TIMES] {
    let even = interleaved::<PLANE, TWICE>(first_bytes(planes), first_bytes(&planes[2 * stride..]));
    let odd = interleaved::<PLANE, TWICE>(first_bytes(&planes[stride..]), first_bytes(&planes[3 * stride..]));
    interleaved::<TWICE, FOUR_TIMES>(&even, &odd)
}

/// Two planes, a byte of `even` and one of `odd` by turns.
#[inline(always)]
fn interleaved<const BYTES: usize, const TWICE: usize>(even: &[u8; BYTES], odd: &[u8; BYTES]) -> [u8; TWICE] {
    let mut mixed = [0u8; TWICE];
    assert!(TWICE == 2 * BYTES);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // The compiler makes single inserts of short planes; SSE2, which every x86-64 has, does it in one instruction.
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
            // SAFETY: eight bytes are read from each plane and TWICE = 16 written.
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
        // The compiler zips longer planes by itself; those of eight bytes it takes apart.
        if BYTES == 8 {
            // SAFETY: eight bytes are read from each plane and TWICE = 16 written; the target has NEON.
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

#[inline(always)]
fn unpack_plane_of<
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
                plane_codes::<B1, B2, B4, B8>($width, &blocks[b][at..], &mut codes[b * B8..(b + 1) * B8]);
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

impl UnpackCodes for Portable {
    #[inline(always)]
    fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]) {
        for_block_len!(layout.block_len, unpack_quads_of, (layout, planes, codes));
    }

    #[inline(always)]
    fn unpack_plane_of_blocks(width: Width, block_len: usize, blocks: &[&[u8]], at: usize, codes: &mut [u8]) {
        for_block_len!(block_len, unpack_plane_of, (width, blocks, at, codes));
    }
}
