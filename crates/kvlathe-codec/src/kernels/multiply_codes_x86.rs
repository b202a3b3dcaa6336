//! [`MultiplyCodes`] for AVX2, AVX-512 and AVX-512 with VNNI.
//!
//! With VNNI bytes are multiplied by bytes, of which one has a sign: an integer is 128·h + l or, where codes have the sign,
//! 256·h + l; the sums of h's products are shifted and those of l's added. Without it codes become 16-bit integers on the way.

use std::arch::x86_64::*;

use super::codes::QUAD;
use super::multiply_codes::{DOT_STEP, MultiplyCodes, check_columns, check_rows};
use super::multiply_x86::{Avx2, Avx512, Avx512Vnni, int_total_256, pair_sum_256, pair_sum_512};
use super::tiles::for_tiles;

/// Defines the tiles and the loops over them for one vector type without VNNI.
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
                for j in (0..k).step_by(4) {
                    let mut even: [$int; VECTORS] = [$zero(); VECTORS];
                    let mut odd: [$int; VECTORS] = [$zero(); VECTORS];
                    for v in 0..VECTORS {
                        // SAFETY: j·n + 4·(column + VECTORS·lanes) ≤ k·n ≤ x.len(), asserted above.
                        let codes =
                            unsafe { $load(x.as_ptr().add(j * n + QUAD * (column + v * $lanes)).cast()) };
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
            fn order_rows(_: &mut [i16]) {}

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

/// Sixteen signed bytes as 16-bit integers.
///
/// # Safety
/// `from` points to sixteen bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn widened_256(from: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(from.cast()) })
}

/// As [`widened_256`], of 32 bytes.
///
/// # Safety
/// `from` points to 32 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn widened_512(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(from.cast()) })
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

/// Lanes of a vector.
const LANES_512: usize = 16;
/// Integers that [`Avx512Vnni`] splits together for products with columns.
const SPLIT: usize = 8;

impl Avx512Vnni {
    /// Eight integers become their h, then their l.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn split_columns(a: &mut [i16]) {
        for run in a.as_chunks_mut::<SPLIT>().0 {
            // SAFETY: sixteen bytes are read and written.
            unsafe {
                let value = _mm_loadu_si128(run.as_ptr().cast());
                let high = _mm_srai_epi16::<7>(_mm_add_epi16(value, _mm_set1_epi16(64)));
                let low = _mm_sub_epi16(value, _mm_slli_epi16::<7>(high));
                _mm_storeu_si128(run.as_mut_ptr().cast(), _mm_packs_epi16(high, low));
            }
        }
    }

    /// Of [`DOT_STEP`] integers all h, then all l.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn split_rows(a: &mut [i16]) {
        for run in a.as_chunks_mut::<DOT_STEP>().0 {
            let mut parts = [_mm256_setzero_si256(); 4];
            for half in 0..2 {
                // SAFETY: half·32 + 32 ≤ 64 integers.
                let value = unsafe { _mm512_loadu_si512(run.as_ptr().add(half * 32).cast()) };
                parts[half] = _mm512_cvtepi16_epi8(_mm512_srli_epi16::<8>(value));
                parts[2 + half] = _mm512_cvtepi16_epi8(value);
            }
            for (i, part) in parts.into_iter().enumerate() {
                // SAFETY: i·16 + 16 ≤ 64 integers of two bytes.
                unsafe { _mm256_storeu_si256(run.as_mut_ptr().add(i * 16).cast(), part) };
            }
        }
    }

    /// `ROWS` rows × `VECTORS` vectors, of which `lanes` lanes are used, from (row, column) on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn quad_tile<const ROWS: usize, const VECTORS: usize>(
        a: &[i16],
        a_stride: usize,
        x: &[u8],
        out: &mut [i32],
        (row, column, lanes): (usize, usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(lanes <= LANES_512 && column + (VECTORS - 1) * LANES_512 + lanes <= n);
        assert!(k <= a_stride && k % 4 == 0 && a_stride % SPLIT == 0);
        assert!(x.len() >= k * n && a.len() >= (row + ROWS) * a_stride && out.len() >= (row + ROWS) * n);
        let mask = ((1u32 << lanes) - 1) as __mmask16;
        let mut sums = [[_mm512_setzero_si512(); VECTORS]; ROWS];
        // Bytes from a run's beginning to its h, then to its l.
        for part in [0, SPLIT] {
            for sum in sums.as_flattened_mut() {
                *sum = _mm512_slli_epi32::<7>(*sum);
            }
            for j in (0..k).step_by(4) {
                let mut codes = [_mm512_setzero_si512(); VECTORS];
                for v in 0..VECTORS {
                    // SAFETY: what the mask leaves ends before j·n + 4n ≤ k·n ≤ x.len(), asserted above.
                    codes[v] = unsafe {
                        let from = x.as_ptr().add(j * n + QUAD * (column + v * LANES_512));
                        _mm512_maskz_loadu_epi32(mask, from.cast())
                    };
                }
                let at = 2 * (j / SPLIT * SPLIT) + part + j % SPLIT;
                for r in 0..ROWS {
                    // SAFETY: at + 4 ≤ 2·a_stride bytes of a row, and row + r is one of a's.
                    let four = unsafe {
                        let row = a.as_ptr().add((row + r) * a_stride).cast::<u8>();
                        _mm512_set1_epi32(row.add(at).cast::<i32>().read_unaligned())
                    };
                    for v in 0..VECTORS {
                        sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], codes[v], four);
                    }
                }
            }
        }
        for r in 0..ROWS {
            for v in 0..VECTORS {
                // SAFETY: what the mask leaves ends before (row + r + 1)·n ≤ out.len(), asserted above.
                unsafe {
                    let to = out.as_mut_ptr().add((row + r) * n + column + v * LANES_512);
                    _mm512_mask_storeu_epi32(to, mask, sums[r][v]);
                }
            }
        }
    }

    /// Dot products of `ROWS` rows of `a` with `COLUMNS` rows of `b`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
        let mut sums = [[_mm512_setzero_si512(); COLUMNS]; ROWS];
        for part in [0, DOT_STEP] {
            for sum in sums.as_flattened_mut() {
                *sum = _mm512_slli_epi32::<8>(*sum);
            }
            for t in (0..k).step_by(DOT_STEP) {
                let mut codes = [_mm512_setzero_si512(); COLUMNS];
                for c in 0..COLUMNS {
                    // SAFETY: (column + c)·k + t + 64 ≤ (column + COLUMNS)·k ≤ b.len(), as 64 divides k.
                    codes[c] = unsafe { _mm512_loadu_si512(b.as_ptr().add((column + c) * k + t).cast()) };
                }
                for r in 0..ROWS {
                    // SAFETY: 2·((row + r)·k + t) + part + 64 ≤ 2·(row + ROWS)·k bytes.
                    let factors = unsafe {
                        let row = a.as_ptr().add((row + r) * k + t).cast::<u8>();
                        _mm512_loadu_si512(row.add(part).cast())
                    };
                    for c in 0..COLUMNS {
                        sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], factors, codes[c]);
                    }
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..COLUMNS {
                out[(row + r) * n + column + c] = _mm512_reduce_add_epi32(sums[r][c]);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn all_quads(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
        let m = check_columns(a, a_stride, x, out, shape);
        let done = for_tiles!(
            quad_tile,
            (m, shape.1),
            (8, [7, 6, 5, 4, 3, 2, 1]),
            (2, LANES_512),
            |row, column| (a, a_stride, x, out, (row, column, LANES_512), shape)
        );
        // A block of eight tokens: half a vector.
        let (rows, lanes) = if done < shape.1 { (m, shape.1 - done) } else { (0, 0) };
        for row in 0..rows {
            Self::quad_tile::<1, 1>(a, a_stride, x, out, (row, done, lanes), shape);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn all_code_dots(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
        let m = check_rows(a, b, out, shape);
        for_tiles!(code_dot_tile, (m, shape.1), (4, [3, 2, 1]), (4, 1), |row, column| (
            a,
            b,
            out,
            (row, column),
            shape
        ));
    }
}

impl MultiplyCodes for Avx512Vnni {
    #[inline(always)]
    fn order_columns(a: &mut [i16]) {
        // SAFETY: the marker is named only where the CPU has these features.
        unsafe { Self::split_columns(a) }
    }

    #[inline(always)]
    fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
        // SAFETY: as above.
        unsafe { Self::all_quads(a, a_stride, x, out, shape) }
    }

    #[inline(always)]
    fn order_rows(a: &mut [i16]) {
        // SAFETY: as above.
        unsafe { Self::split_rows(a) }
    }

    #[inline(always)]
    fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
        // SAFETY: as above.
        unsafe { Self::all_code_dots(a, b, out, shape) }
    }
}
