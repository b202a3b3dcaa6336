//! [`MultiplyCodes`] for AVX2, AVX-512 and AVX-512 with VNNI: codes become 16-bit integers on the way.

use std::arch::x86_64::*;

use super::codes::QUAD;
use super::multiply_codes::{DOT_STEP, MultiplyCodes, check_columns, check_rows};
use super::multiply_x86::{
    Avx2, Avx512, Avx512Vnni, int_total_256, pair_sum_256, pair_sum_512, pair_sum_vnni,
};
use super::tiles::for_tiles;

/// Defines the tiles and the loops over them for one instruction set.
macro_rules! tiled_multiply_codes {
    ($marker:ident, $features:literal, $lanes:literal, $int:ty, $zero:ident, $load:ident, $store:ident, $splat:ident,
     $low_bytes:expr, $high_bytes:ident, $widened:expr, $pair_sum:ident, $total:ident,
     $tallest:literal, $rows:tt, $dot_tallest:literal, $dot_rows:tt) => {
        impl $marker {
            /// `ROWS` rows × `VECTORS` vectors of columns from (row, column) on.
            #[target_feature(enable = $features)]
            #[inline]
            fn quad_tile<const ROWS: usize, const VECTORS: usize>(
                a: &[i16],
                a_stride: usize,
                x: &[u8],
                out: &mut [i32],
                (row, column): (usize, usize),
                (k, n): (usize, usize),
            ) {
                assert!(column + VECTORS * $lanes <= n && k <= a_stride && k % 4 == 0);
                assert!(x.len() >= k * n && a.len() >= (row + ROWS - 1) * a_stride + k);
                assert!(out.len() >= (row + ROWS) * n);
                let mut sums: [[$int; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
                for j in (0..k).step_by(QUAD) {
                    let mut even: [$int; VECTORS] = [$zero(); VECTORS];
                    let mut odd: [$int; VECTORS] = [$zero(); VECTORS];
                    for v in 0..VECTORS {
                        let at = j * n + QUAD * (column + v * $lanes);
                        // SAFETY: j·n + 4·(column + VECTORS·lanes) ≤ k·n ≤ x.len(), asserted above.
                        let codes = unsafe { $load(x.as_ptr().add(at).cast()) };
                        even[v] = $low_bytes(codes);
                        odd[v] = $high_bytes::<8>(codes);
                    }
                    for r in 0..ROWS {
                        // SAFETY: (row + r)·a_stride + j + 4 ≤ (row + ROWS − 1)·a_stride + k ≤ a.len().
                        let (first, second) = unsafe {
                            let pairs = a.as_ptr().add((row + r) * a_stride + j).cast::<i32>();
                            ($splat(pairs.read_unaligned()), $splat(pairs.add(1).read_unaligned()))
                        };
                        for v in 0..VECTORS {
                            sums[r][v] = $pair_sum(sums[r][v], even[v], first);
                            sums[r][v] = $pair_sum(sums[r][v], odd[v], second);
                        }
                    }
                }
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        // SAFETY: (row + r)·n + column + VECTORS·lanes ≤ (row + ROWS)·n ≤ out.len(), asserted above.
                        unsafe {
                            $store(
                                out.as_mut_ptr().add((row + r) * n + column + v * $lanes).cast(),
                                sums[r][v],
                            )
                        };
                    }
                }
            }

            /// Dot products of `ROWS` rows of `a` with `COLUMNS` rows of `b`.
            #[target_feature(enable = $features)]
            #[inline]
            fn code_dot_tile<const ROWS: usize, const COLUMNS: usize>(
                a: &[i16],
                b: &[u8],
                out: &mut [i32],
                (row, column): (usize, usize),
                (k, n): (usize, usize),
            ) {
                assert!(k % DOT_STEP == 0 && column + COLUMNS <= n && out.len() >= (row + ROWS) * n);
                assert!(a.len() >= (row + ROWS) * k && b.len() >= (column + COLUMNS) * k);
                let mut sums: [[$int; COLUMNS]; ROWS] = [[$zero(); COLUMNS]; ROWS];
                for t in (0..k).step_by(2 * $lanes) {
                    let mut codes: [$int; COLUMNS] = [$zero(); COLUMNS];
                    for c in 0..COLUMNS {
                        // SAFETY: (column + c)·k + t + 2·lanes ≤ (column + COLUMNS)·k ≤ b.len(), as 2·lanes divides k.
                        codes[c] = unsafe { $widened(b.as_ptr().add((column + c) * k + t)) };
                    }
                    for r in 0..ROWS {
                        // SAFETY: (row + r)·k + t + 2·lanes ≤ (row + ROWS)·k ≤ a.len(), likewise.
                        let factors = unsafe { $load(a.as_ptr().add((row + r) * k + t).cast()) };
                        for c in 0..COLUMNS {
                            sums[r][c] = $pair_sum(sums[r][c], codes[c], factors);
                        }
                    }
                }
                for r in 0..ROWS {
                    for c in 0..COLUMNS {
                        out[(row + r) * n + column + c] = $total(sums[r][c]);
                    }
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all_quads(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
                let m = check_columns(a, a_stride, x, out, shape);
                let done = for_tiles!(
                    quad_tile,
                    (m, shape.1),
                    ($tallest, $rows),
                    (2, $lanes),
                    |row, column| (a, a_stride, x, out, (row, column), shape)
                );
                // A block of eight tokens on AVX-512: half a vector.
                let left = if done < shape.1 { m } else { 0 };
                for row in 0..left {
                    Avx2::quad_tile::<1, 1>(a, a_stride, x, out, (row, done), shape);
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all_code_dots(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
                let m = check_rows(a, b, out, shape);
                for_tiles!(code_dot_tile, (m, shape.1), ($dot_tallest, $dot_rows), (4, 1), |row, column| (
                    a,
                    b,
                    out,
                    (row, column),
                    shape
                ));
            }
        }

        impl MultiplyCodes for $marker {
            /// Of four, the two that meet even bytes, then the two that meet odd ones.
            #[inline(always)]
            fn order_columns(a: &mut [i16]) {
                // SAFETY: the marker is named only where the CPU has these features.
                unsafe { swap_middles(a) }
            }

            #[inline(always)]
            fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
                // SAFETY: as above.
                unsafe { Self::all_quads(a, a_stride, x, out, shape) }
            }

            #[inline(always)]
            fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
                // SAFETY: as above.
                unsafe { Self::all_code_dots(a, b, out, shape) }
            }
        }
    };
}

/// Of four integers each, the second and the third change places.
#[target_feature(enable = "avx2")]
#[inline]
fn swap_middles(a: &mut [i16]) {
    for run in a.as_chunks_mut::<8>().0 {
        // SAFETY: sixteen bytes are read and written.
        unsafe {
            let value = _mm_loadu_si128(run.as_ptr().cast());
            let value = _mm_shufflehi_epi16::<0b11_01_10_00>(_mm_shufflelo_epi16::<0b11_01_10_00>(value));
            _mm_storeu_si128(run.as_mut_ptr().cast(), value);
        }
    }
}

/// The even bytes as 16-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
fn low_bytes_256(codes: __m256i) -> __m256i {
    _mm256_and_si256(codes, _mm256_set1_epi16(255))
}

/// As [`low_bytes_256`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn low_bytes_512(codes: __m512i) -> __m512i {
    _mm512_and_si512(codes, _mm512_set1_epi16(255))
}

/// Sixteen bytes as 16-bit integers.
///
/// # Safety
/// `from` points to sixteen bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn widened_256(from: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(from.cast()) })
}

/// As [`widened_256`], of 32 bytes.
///
/// # Safety
/// `from` points to 32 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn widened_512(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(from.cast()) })
}

tiled_multiply_codes!(
    Avx2,
    "avx2,fma",
    8,
    __m256i,
    _mm256_setzero_si256,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_set1_epi32,
    low_bytes_256,
    _mm256_srli_epi16,
    widened_256,
    pair_sum_256,
    int_total_256,
    4,
    [3, 2, 1],
    2,
    [1]
);
tiled_multiply_codes!(
    Avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    16,
    __m512i,
    _mm512_setzero_si512,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    low_bytes_512,
    _mm512_srli_epi16,
    widened_512,
    pair_sum_512,
    _mm512_reduce_add_epi32,
    8,
    [7, 6, 5, 4, 3, 2, 1],
    4,
    [3, 2, 1]
);
tiled_multiply_codes!(
    Avx512Vnni,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma",
    16,
    __m512i,
    _mm512_setzero_si512,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    low_bytes_512,
    _mm512_srli_epi16,
    widened_512,
    pair_sum_vnni,
    _mm512_reduce_add_epi32,
    8,
    [7, 6, 5, 4, 3, 2, 1],
    4,
    [3, 2, 1]
);
