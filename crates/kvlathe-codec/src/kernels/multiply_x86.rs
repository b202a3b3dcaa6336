//! [`Multiply`] for AVX2 and AVX-512: tiles of rows × tokens whose sums stay in registers.

use std::arch::x86_64::*;

use super::multiply::{Multiply, check_shape};

/// Defines the tile and the loop over tiles for one vector type.
macro_rules! tiled_multiply {
    ($marker:ident, $doc:literal, $features:literal, $lanes:literal, $vector:ty,
     $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident, $tall:literal) => {
        #[doc = $doc]
        pub(super) struct $marker;

        impl $marker {
            /// `ROWS` rows × `VECTORS` vectors of tokens from (row, column) on.
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
                let mut sums: [[$vector; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
                for j in 0..k {
                    let mut values: [$vector; VECTORS] = [$zero(); VECTORS];
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

            /// All rows of the columns from `column` on, as many as `VECTORS` vectors hold.
            #[target_feature(enable = $features)]
            #[inline]
            fn strip<const VECTORS: usize>(
                a: &[f32],
                x: &[f32],
                out: &mut [f32],
                column: usize,
                m: usize,
                shape: (usize, usize),
            ) {
                let mut row = 0;
                while row + $tall <= m {
                    Self::tile::<$tall, VECTORS>(a, x, out, (row, column), shape);
                    row += $tall;
                }
                while row + 2 <= m {
                    Self::tile::<2, VECTORS>(a, x, out, (row, column), shape);
                    row += 2;
                }
                if row < m {
                    Self::tile::<1, VECTORS>(a, x, out, (row, column), shape);
                }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn all(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
                let m = check_shape(a, x, out, shape);
                let n = shape.1;
                let mut column = 0;
                while column + 32 <= n {
                    Self::strip::<{ 32 / $lanes }>(a, x, out, column, m, shape);
                    column += 32;
                }
                while column + $lanes <= n {
                    Self::strip::<1>(a, x, out, column, m, shape);
                    column += $lanes;
                }
                if column < n {
                    // A block of eight tokens on AVX-512: half a vector.
                    narrow(a, x, out, column, m, shape);
                }
            }
        }

        impl Multiply for $marker {
            #[inline(always)]
            fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
                // SAFETY: the marker is named only inside functions that enable these features.
                unsafe { Self::all(a, x, out, shape) }
            }
        }
    };
}

/// Eight tokens with AVX2, for the vector types that are wider than the block.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn narrow(a: &[f32], x: &[f32], out: &mut [f32], column: usize, m: usize, shape: (usize, usize)) {
    for row in 0..m {
        Avx2::tile::<1, 1>(a, x, out, (row, column), shape);
    }
}

tiled_multiply!(
    Avx2,
    "AVX2 and FMA.",
    "avx2,fma",
    8,
    __m256,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    2
);
tiled_multiply!(
    Avx512,
    "AVX-512.",
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    16,
    __m512,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    8
);
