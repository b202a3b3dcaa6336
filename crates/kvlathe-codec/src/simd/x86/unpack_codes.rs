//! Packed planes of 64 tokens to codes with AVX-512: a plane fills one register, four interleaved planes four.

use std::arch::x86_64::*;

use crate::format::layout::Layout;
use crate::format::plane::plane_bytes;
use crate::format::width::Width;
use crate::simd::isa::{Avx2, Avx512, Avx512Vnni, Portable};
use crate::simd::multiply_codes::QUAD;
use crate::simd::unpack_codes::UnpackCodes;

/// Tokens of a block.
const N: usize = 64;

/// 64 bytes from `at` on.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(bytes: &[u8], at: usize) -> __m512i {
    let bytes: &[u8; 64] = bytes[at..at + 64].try_into().expect("64 bytes");
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// The first 32 bytes, twice.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_32(bytes: &[u8]) -> __m512i {
    let bytes: &[u8; 32] = bytes[..32].try_into().expect("32 bytes");
    // SAFETY: the array has 32 bytes.
    _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// The first 16 bytes, four times.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_16(bytes: &[u8]) -> __m512i {
    let bytes: &[u8; 16] = bytes[..16].try_into().expect("16 bytes");
    // SAFETY: the array has 16 bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// The first 8 bytes, eight times.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_8(bytes: &[u8]) -> __m512i {
    _mm512_set1_epi64(i64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(value: __m512i, codes: &mut [u8], at: usize) {
    let codes: &mut [u8; 64] = (&mut codes[at..at + 64]).try_into().expect("64 bytes");
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), value) };
}

/// Bits of each byte.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn masked(value: __m512i, mask: i8) -> __m512i {
    _mm512_and_si512(value, _mm512_set1_epi8(mask))
}

/// A plane of two bits a token.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn two_bits(plane: &[u8]) -> __m512i {
    masked(_mm512_srlv_epi64(load_16(plane), _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)), 3)
}

/// The codes of one plane, in the order of tokens: run k of them stands in the bits that a shift by k fields brings down.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn plane_codes(width: Width, plane: &[u8]) -> __m512i {
    match width {
        Width::W0 => _mm512_setzero_si512(),
        Width::W1 => masked(_mm512_srlv_epi64(load_8(plane), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)), 1),
        Width::W2 => two_bits(plane),
        Width::W3 => {
            // The third bit is turned to its place: right by k − 2.
            let high = _mm512_rorv_epi64(load_8(&plane[16..]), _mm512_setr_epi64(62, 63, 0, 1, 2, 3, 4, 5));
            _mm512_or_si512(two_bits(plane), masked(high, 4))
        }
        Width::W4 => masked(_mm512_srlv_epi64(load_32(plane), _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), 15),
        Width::W8 => load(plane, 0),
    }
}

/// Four planes of codes, interleaved: `codes[t]` has those of token t.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn store_interleaved(planes: [__m512i; QUAD], codes: &mut [u8]) {
    let [low, high] = [
        [_mm512_unpacklo_epi8(planes[0], planes[1]), _mm512_unpacklo_epi8(planes[2], planes[3])],
        [_mm512_unpackhi_epi8(planes[0], planes[1]), _mm512_unpackhi_epi8(planes[2], planes[3])],
    ];
    // Quarter l of runs[i] has the tokens 16·l + 4·i to 16·l + 4·i + 3.
    let runs = [
        _mm512_unpacklo_epi16(low[0], low[1]),
        _mm512_unpackhi_epi16(low[0], low[1]),
        _mm512_unpacklo_epi16(high[0], high[1]),
        _mm512_unpackhi_epi16(high[0], high[1]),
    ];
    let first =
        [_mm512_shuffle_i32x4::<0x44>(runs[0], runs[1]), _mm512_shuffle_i32x4::<0x44>(runs[2], runs[3])];
    let last =
        [_mm512_shuffle_i32x4::<0xee>(runs[0], runs[1]), _mm512_shuffle_i32x4::<0xee>(runs[2], runs[3])];
    store(_mm512_shuffle_i32x4::<0x88>(first[0], first[1]), codes, 0);
    store(_mm512_shuffle_i32x4::<0xdd>(first[0], first[1]), codes, 64);
    store(_mm512_shuffle_i32x4::<0x88>(last[0], last[1]), codes, 128);
    store(_mm512_shuffle_i32x4::<0xdd>(last[0], last[1]), codes, 192);
}

/// In each quarter, four runs of four bytes to four bytes of each run.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn interleaved_bytes(value: __m512i) -> __m512i {
    let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_shuffle_epi8(value, _mm512_broadcast_i32x4(order))
}

/// Four planes of width 1, 32 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad_of_1(planes: &[u8], codes: &mut [u8]) {
    let order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7);
    let mixed = interleaved_bytes(_mm512_permutexvar_epi32(order, load_32(planes)));
    for m in 0..4 {
        let (even, odd) = (2 * m, 2 * m + 1);
        let shifts = _mm512_setr_epi64(even, even, even, even, odd, odd, odd, odd);
        store(masked(_mm512_srlv_epi64(mixed, shifts), 1), codes, 64 * m as usize);
    }
}

/// Four planes of width 2, 64 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad_of_2(planes: &[u8], codes: &mut [u8]) {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let mixed = interleaved_bytes(_mm512_permutexvar_epi32(order, load(planes, 0)));
    store(masked(mixed, 3), codes, 0);
    store(masked(_mm512_srli_epi32::<2>(mixed), 3), codes, 64);
    store(masked(_mm512_srli_epi32::<4>(mixed), 3), codes, 128);
    store(masked(_mm512_srli_epi32::<6>(mixed), 3), codes, 192);
}

/// Four planes of width 3, 96 bytes: in each the two low bits, then the high ones.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad_of_3(planes: &[u8], codes: &mut [u8]) {
    // Words of four bytes: those from the sixteenth on are 16 to 23 of the two registers together.
    let (first, last) = (load(planes, 0), load(planes, 32));
    let order = _mm512_setr_epi32(0, 6, 12, 18 + 8, 1, 7, 13, 19 + 8, 2, 8, 14, 20 + 8, 3, 9, 15, 21 + 8);
    let low = interleaved_bytes(_mm512_permutex2var_epi32(first, order, last));
    let order = _mm512_setr_epi32(
        4,
        10,
        16 + 8,
        22 + 8,
        5,
        11,
        17 + 8,
        23 + 8,
        4,
        10,
        16 + 8,
        22 + 8,
        5,
        11,
        17 + 8,
        23 + 8,
    );
    let high = interleaved_bytes(_mm512_permutex2var_epi32(first, order, last));
    for m in 0..4 {
        let (even, odd) = ((2 * m + 62) % 64, (2 * m + 63) % 64);
        let turns = _mm512_setr_epi64(even, even, even, even, odd, odd, odd, odd);
        let low = masked(_mm512_srlv_epi64(low, _mm512_set1_epi64(2 * m)), 3);
        let high = masked(_mm512_rorv_epi64(high, turns), 4);
        store(_mm512_or_si512(low, high), codes, 64 * m as usize);
    }
}

/// Four planes of width 4, 128 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad_of_4(planes: &[u8], codes: &mut [u8]) {
    let (first, last) = (load(planes, 0), load(planes, 64));
    let order = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    let low = interleaved_bytes(_mm512_permutex2var_epi32(first, order, last));
    let order = _mm512_add_epi32(order, _mm512_set1_epi32(4));
    let high = interleaved_bytes(_mm512_permutex2var_epi32(first, order, last));
    store(masked(low, 15), codes, 0);
    store(masked(high, 15), codes, 64);
    store(masked(_mm512_srli_epi32::<4>(low), 15), codes, 128);
    store(masked(_mm512_srli_epi32::<4>(high), 15), codes, 192);
}

/// Four planes of any widths.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quad(layout: &Layout, i: usize, planes: &[u8], codes: &mut [u8]) -> usize {
    let mut of_planes = [_mm512_setzero_si512(); QUAD];
    let mut at = 0;
    for r in 0..QUAD.min(layout.n_coded() - i) {
        let width = layout.widths[i + r];
        of_planes[r] = plane_codes(width, &planes[at..]);
        at += plane_bytes(width, N);
    }
    store_interleaved(of_planes, codes);
    at
}

/// As [`UnpackCodes::unpack_quads`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]) {
    let [n8, n4, n3, n2, n1] = layout.planes_of_width;
    let (mut i, mut at) = (0, 0);
    macro_rules! width {
        ($end:expr, $plane:literal, $quad:ident) => {
            let end = $end;
            while i + QUAD <= end {
                $quad(&planes[at..at + QUAD * $plane], &mut codes[i * N..(i + QUAD) * N]);
                (i, at) = (i + QUAD, at + QUAD * $plane);
            }
            if i < end {
                at += quad(layout, i, &planes[at..], &mut codes[i * N..(i + QUAD) * N]);
                i += QUAD;
            }
        };
    }
    // Planes that are codes already only have to be interleaved, as those of different widths.
    while i < n8 {
        at += quad(layout, i, &planes[at..], &mut codes[i * N..(i + QUAD) * N]);
        i += QUAD;
    }
    width!(n8 + n4, 32, quad_of_4);
    width!(n8 + n4 + n3, 24, quad_of_3);
    width!(n8 + n4 + n3 + n2, 16, quad_of_2);
    width!(n8 + n4 + n3 + n2 + n1, 8, quad_of_1);
    debug_assert_eq!((i, at), (layout.n_coded().next_multiple_of(QUAD), planes.len()));
}

/// As [`UnpackCodes::unpack_plane_of_blocks`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn unpack_plane_of_blocks(width: Width, blocks: &[&[u8]], at: usize, codes: &mut [u8]) {
    // The width is settled outside of the loop.
    macro_rules! each_block {
        ($width:expr) => {
            for b in 0..blocks.len() {
                store(plane_codes($width, &blocks[b][at..]), codes, b * N);
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

macro_rules! unpack_codes {
    ($marker:ident) => {
        impl UnpackCodes for $marker {
            #[inline(always)]
            fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]) {
                if layout.block_len == N {
                    // SAFETY: the marker is named only where the CPU has these features.
                    unsafe { unpack_quads(layout, planes, codes) }
                } else {
                    Portable::unpack_quads(layout, planes, codes);
                }
            }

            #[inline(always)]
            fn unpack_plane_of_blocks(
                width: Width,
                block_len: usize,
                blocks: &[&[u8]],
                at: usize,
                codes: &mut [u8],
            ) {
                if block_len == N {
                    // SAFETY: as above.
                    unsafe { unpack_plane_of_blocks(width, blocks, at, codes) }
                } else {
                    Portable::unpack_plane_of_blocks(width, block_len, blocks, at, codes);
                }
            }
        }
    };
}

/// The portable text, compiled for AVX2.
impl UnpackCodes for Avx2 {
    #[inline(always)]
    fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]) {
        Portable::unpack_quads(layout, planes, codes);
    }

    #[inline(always)]
    fn unpack_plane_of_blocks(width: Width, block_len: usize, blocks: &[&[u8]], at: usize, codes: &mut [u8]) {
        Portable::unpack_plane_of_blocks(width, block_len, blocks, at, codes);
    }
}

unpack_codes!(Avx512);
unpack_codes!(Avx512Vnni);
