//! [`Multiply`] for AVX2, AVX-512 and AVX-512 with VNNI: tiles of rows × columns whose sums stay in registers.

use std::arch::asm;
use std::arch::x86_64::*;

use super::floats::Two;
use super::multiply::{Multiply, check_dot, check_pairs, check_shape};
use super::tiles::for_tiles;

/// Defines the tiles and the loops over them for one vector type.
macro_rules! tiled_multiply {
    ($marker:ident, $doc:literal, $features:literal, $lanes:literal, $wide:ty, $float:ty, $int:ty,
     $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident, $total:ident,
     $int_zero:ident, $int_load:ident, $int_store:ident, $int_splat:ident, $pair_sum:ident,
     $tallest:literal, $rows:tt, $dot_tallest:literal, $dot_rows:tt) => {
        #[doc = $doc]
        pub(super) struct $marker;

        impl $marker {
            /// `ROWS` rows × `VECTORS` vectors of columns from (row, column) on.
            #[target_feature(enable = $features)]
            #[inline]
            fn tile<const ROWS: usize, const VECTORS: usize>(
                a: &[f32],
                x: &[f32],
                out: &mut [f32],
                (row, column): (usize, usize),
                (k, n): (usize, usize),
            ) {
                assert!(column + VECTORS * $lanes <= n);
                assert!(x.len() >= k * n && a.len() >= (row + ROWS) * k && out.len() >= (row + ROWS) * n);
                let mut sums: [[$float; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
                for j in 0..k {
                    let mut values: [$float; VECTORS] = [$zero(); VECTORS];
                    for v in 0..VECTORS {
                        // SAFETY: j·n + column + VECTORS·lanes ≤ k·n ≤ x.len(), asserted above.
                        values[v] = unsafe { $load(x.as_ptr().add(j * n + column + v * $lanes)) };
                    }
                    for r in 0..ROWS {
                        // SAFETY: (row + r)·k + j < (row + ROWS)·k ≤ a.len(), asserted above.
                        let factor = $splat(unsafe { *a.get_unchecked((row + r) * k + j) });
                        for v in 0..VECTORS {
                            sums[r][v] = $fma(factor, values[v], sums[r][v]);
                        }
                    }
                }
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        // SAFETY: (row + r)·n + column + VECTORS·lanes ≤ (row + ROWS)·n ≤ out.len(), asserted above.
                        unsafe {
                            $store(out.as_mut_ptr().add((row + r) * n + column + v * $lanes), sums[r][v])
                        };
                    }
                }
            }

            /// As `tile`, for 16-bit integers whose rows of `x` lie interleaved in pairs.
            #[target_feature(enable = $features)]
            #[inline]
            fn pair_tile<const ROWS: usize, const VECTORS: usize>(
                a: &[i16],
                a_stride: usize,
                x: &[i16],
                out: &mut [i32],
                (row, column): (usize, usize),
                (k, n): (usize, usize),
            ) {
                assert!(column + VECTORS * $lanes <= n && k <= a_stride && k % 2 == 0);
                assert!(x.len() >= k * n && a.len() >= (row + ROWS - 1) * a_stride + k);
                assert!(out.len() >= (row + ROWS) * n);
                let mut sums: [[$int; VECTORS]; ROWS] = [[$int_zero(); VECTORS]; ROWS];
                for j in 0..k / 2 {
                    let mut values: [$int; VECTORS] = [$int_zero(); VECTORS];
                    for v in 0..VECTORS {
                        values[v] =
                            // SAFETY: 2·(j·n + column + VECTORS·lanes) ≤ k·n ≤ x.len(), asserted above.
                            unsafe { $int_load(x.as_ptr().add(2 * (j * n + column + v * $lanes)).cast()) };
                    }
                    for r in 0..ROWS {
                        // SAFETY: (row + r)·a_stride + 2j + 1 < (row + ROWS − 1)·a_stride + k ≤ a.len().
                        let pair = $int_splat(unsafe {
                            a.as_ptr().add((row + r) * a_stride + 2 * j).cast::<i32>().read_unaligned()
                        });
                        for v in 0..VECTORS {
                            sums[r][v] = $pair_sum(sums[r][v], values[v], pair);
                        }
                    }
                }
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        // SAFETY: (row + r)·n + column + VECTORS·lanes ≤ (row + ROWS)·n ≤ out.len(), asserted above.
                        unsafe {
                            $int_store(
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
            fn dot_tile<const ROWS: usize, const COLUMNS: usize>(
                a: &[f32],
                b: &[f32],
                out: &mut [f32],
                (row, column): (usize, usize),
                (k, n): (usize, usize),
            ) {
                assert!(column + COLUMNS <= n && out.len() >= (row + ROWS) * n);
                assert!(a.len() >= (row + ROWS) * k && b.len() >= (column + COLUMNS) * k);
                let mut sums: [[$float; COLUMNS]; ROWS] = [[$zero(); COLUMNS]; ROWS];
                let whole = k / $lanes * $lanes;
                for t in (0..whole).step_by($lanes) {
                    let mut values: [$float; COLUMNS] = [$zero(); COLUMNS];
                    for c in 0..COLUMNS {
                        // SAFETY: (column + c)·k + t + lanes ≤ (column + COLUMNS)·k ≤ b.len().
                        values[c] = unsafe { $load(b.as_ptr().add((column + c) * k + t)) };
                    }
                    for r in 0..ROWS {
                        // SAFETY: (row + r)·k + t + lanes ≤ (row + ROWS)·k ≤ a.len().
                        let factors = unsafe { $load(a.as_ptr().add((row + r) * k + t)) };
                        for c in 0..COLUMNS {
                            sums[r][c] = $fma(factors, values[c], sums[r][c]);
                        }
                    }
                }
                for r in 0..ROWS {
                    for c in 0..COLUMNS {
                        let mut total = $total(sums[r][c]);
                        for t in whole..k {
                            total = a[(row + r) * k + t].mul_add(b[(column + c) * k + t], total);
                        }
                        out[(row + r) * n + column + c] = total;
                    }
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
                let m = check_shape(a, x, out, shape);
                let done = for_tiles!(tile, (m, shape.1), ($tallest, $rows), (2, $lanes), |row, column| (
                    a, x, out, (row, column), shape
                ));
                // A block of eight tokens on AVX-512: half a vector.
                let left = if done < shape.1 { m } else { 0 };
                for row in 0..left {
                    Avx2::tile::<1, 1>(a, x, out, (row, done), shape);
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all_pairs(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize)) {
                let m = check_pairs(a, a_stride, x, out, shape);
                let done = for_tiles!(pair_tile, (m, shape.1), ($tallest, $rows), (2, $lanes), |row, column| (
                    a, a_stride, x, out, (row, column), shape
                ));
                let left = if done < shape.1 { m } else { 0 };
                for row in 0..left {
                    Avx2::pair_tile::<1, 1>(a, a_stride, x, out, (row, done), shape);
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all_dots(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
                let m = check_dot(a, b, out, shape);
                for_tiles!(dot_tile, (m, shape.1), ($dot_tallest, $dot_rows), (4, 1), |row, column| (
                    a, b, out, (row, column), shape
                ));
            }
        }

        impl Multiply for $marker {
            type F32x8 = __m256;
            type F32x16 = $wide;

            #[inline(always)]
            fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
                // SAFETY: the marker is named only inside functions that enable these features.
                unsafe { Self::all(a, x, out, shape) }
            }

            #[inline(always)]
            fn dot(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
                // SAFETY: as above.
                unsafe { Self::all_dots(a, b, out, shape) }
            }

            #[inline(always)]
            fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize)) {
                // SAFETY: as above.
                unsafe { Self::all_pairs(a, a_stride, x, out, shape) }
            }
        }
    };
}

/// The sum of eight lanes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn total_256(lanes: __m256) -> f32 {
    let halves = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps::<1>(pairs, pairs)))
}

/// As [`total_256`], for integers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn int_total_256(lanes: __m256i) -> i32 {
    let halves = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    let pairs = _mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves));
    _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32::<1>(pairs)))
}

/// sum + the sums of products of neighbouring 16-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pair_sum_256(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
}

/// As [`pair_sum_256`], in 512 bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn pair_sum_512(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
}

/// As [`pair_sum_512`], in one instruction.
///
/// Not the intrinsic: without knowing the processor, LLVM turns half of these back into a product and a sum, as some
/// processors have the sum of a chain sooner that way. Tiles have chains enough.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn pair_sum_vnni(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    let mut result = sum;
    // SAFETY: the instruction reads and writes registers only, and VNNI is enabled.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) result,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    result
}

tiled_multiply!(
    Avx2,
    "AVX2 and FMA.",
    "avx2,fma",
    8,
    Two<__m256>,
    __m256,
    __m256i,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    total_256,
    _mm256_setzero_si256,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_set1_epi32,
    pair_sum_256,
    6,
    [5, 4, 3, 2, 1],
    2,
    [1]
);
tiled_multiply!(
    Avx512,
    "AVX-512 F, BW, VL, DQ.",
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    16,
    __m512,
    __m512,
    __m512i,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_reduce_add_ps,
    _mm512_setzero_si512,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    pair_sum_512,
    12,
    [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1],
    4,
    [3, 2, 1]
);
tiled_multiply!(
    Avx512Vnni,
    "AVX-512 with VNNI, which multiplies and adds pairs of integers in one instruction.",
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma",
    16,
    __m512,
    __m512,
    __m512i,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_reduce_add_ps,
    _mm512_setzero_si512,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_epi32,
    pair_sum_vnni,
    12,
    [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1],
    4,
    [3, 2, 1]
);
