//! The products that coding and attention spend their time in.

use super::codes::UnpackCodes;
use super::floats::{Floats, UnpackSides};
use super::lanes::{LANES, WIDE};
use super::multiply_codes::MultiplyCodes;

/// The matrix products, and the vectors, of one instruction set.
///
/// All matrices are row-major. Entries of [`Multiply::multiply`] are one chain of fused multiply-adds in rising k and
/// integer entries are exact, so every instruction set gives the same bits of them.
pub(super) trait Multiply: MultiplyCodes + UnpackCodes {
    /// What the loops around the products use.
    type F32x8: UnpackSides;
    /// Where there are whole groups of sixteen.
    type F32x16: Floats<WIDE>;

    /// out[m, n] = a[m, k] · x[k, n]; `shape` is (k, n), `m = out.len() / n`, n a multiple of eight.
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · b[n, k]ᵀ: dot products of rows; `shape` is (k, n), k a multiple of eight.
    fn dot(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · x, with x as `[k/2, n, 2]`: two rows lie interleaved, as the instructions that multiply
    /// pairs of 16-bit integers want them. The rows of `a` begin `a_stride` apart; k is even, n a multiple of eight.
    fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize));
}

/// Panics unless the slices have the lengths that the shape asks for: the bounds that unchecked loads rely on.
#[inline(always)]
pub(super) fn check_shape(a: &[f32], x: &[f32], out: &[f32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && n.is_multiple_of(8) && out.len().is_multiple_of(n));
    let m = out.len() / n;
    assert!(a.len() >= m * k && x.len() >= k * n);
    m
}

/// As [`check_shape`], for [`Multiply::dot`].
#[inline(always)]
pub(super) fn check_dot(a: &[f32], b: &[f32], out: &[f32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && out.len().is_multiple_of(n) && k.is_multiple_of(8));
    let m = out.len() / n;
    assert!(a.len() >= m * k && b.len() >= n * k);
    m
}

/// As [`check_shape`], for [`Multiply::multiply_i16`].
#[inline(always)]
pub(super) fn check_pairs(
    a: &[i16],
    a_stride: usize,
    x: &[i16],
    out: &[i32],
    (k, n): (usize, usize),
) -> usize {
    assert!(
        n > 0 && n.is_multiple_of(8) && out.len().is_multiple_of(n) && k.is_multiple_of(2) && k <= a_stride
    );
    let m = out.len() / n;
    assert!(m == 0 || a.len() >= (m - 1) * a_stride + k);
    assert!(x.len() >= k * n);
    m
}

/// No more than the build's target guarantees; what the others are tested against.
pub(super) struct Portable;

impl Multiply for Portable {
    type F32x8 = [f32; LANES];
    type F32x16 = [f32; WIDE];

    #[inline(always)]
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], (k, n): (usize, usize)) {
        let m = check_shape(a, x, out, (k, n));
        for i in 0..m {
            let sums = &mut out[i * n..(i + 1) * n];
            sums.fill(0.0);
            for j in 0..k {
                let factor = a[i * k + j];
                for (sum, value) in sums.iter_mut().zip(&x[j * n..(j + 1) * n]) {
                    *sum = factor.mul_add(*value, *sum);
                }
            }
        }
    }

    #[inline(always)]
    fn dot(a: &[f32], b: &[f32], out: &mut [f32], (k, n): (usize, usize)) {
        let m = check_dot(a, b, out, (k, n));
        for i in 0..m {
            for j in 0..n {
                let (a, b) = (&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
                let mut lanes = [0.0f32; 8];
                for t in (0..k).step_by(8) {
                    for l in 0..8 {
                        lanes[l] += a[t + l] * b[t + l];
                    }
                }
                out[i * n + j] = lanes.iter().sum();
            }
        }
    }

    #[inline(always)]
    fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], (k, n): (usize, usize)) {
        let m = check_pairs(a, a_stride, x, out, (k, n));
        for i in 0..m {
            let sums = &mut out[i * n..(i + 1) * n];
            sums.fill(0);
            for j in 0..k / 2 {
                let pair = [a[i * a_stride + 2 * j], a[i * a_stride + 2 * j + 1]].map(i32::from);
                for (sum, value) in sums.iter_mut().zip(x[2 * j * n..2 * (j + 1) * n].chunks_exact(2)) {
                    *sum += pair[0] * i32::from(value[0]) + pair[1] * i32::from(value[1]);
                }
            }
        }
    }
}

#[cfg(test)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tests {
    use super::*;
    use crate::kernels::{Isa, available_isas};

    /// Integers of up to ±`largest`, the extremes among them.
    fn integers(n: usize, largest: i32, seed: u32) -> Vec<i16> {
        (0..n as u32)
            .map(|i| match (i * 8 + seed).wrapping_mul(0x9e37_79b9).rotate_left(13) {
                hash if hash % 5 == 0 => largest as i16,
                hash if hash % 5 == 1 => -largest as i16,
                hash => (hash as i32 % largest) as i16,
            })
            .collect()
    }

    fn floats(n: usize, seed: u32) -> Vec<f32> {
        integers(n, 32_700, seed).into_iter().map(|v| f32::from(v) * 0.37).collect()
    }

    /// Codes, the largest among them.
    fn codes(n: usize, seed: u32) -> Vec<u8> {
        integers(n, 255, seed).into_iter().map(|v| v.unsigned_abs() as u8).collect()
    }

    /// Every height and width of tiles, and some more rows and columns than asked for.
    fn agrees_with_portable<M: Multiply>(name: &str) {
        for m in (1..=9).chain([17]) {
            for (k, n) in [(2, 8), (32, 8), (64, 16), (96, 24), (64, 40), (32, 64)] {
                // No sum may exceed 32 bits, as the callers see to it.
                let largest = (f64::from(i32::MAX) / k as f64).sqrt() as i32;
                let (stride, case) = (k + 4, format!("{name} m={m} k={k} n={n}"));
                let (a, x) = (integers(m * stride, largest, 1), integers(k * n, largest, 2));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
                M::multiply_i16(&a, stride, &x, &mut ours, (k, n));
                Portable::multiply_i16(&a, stride, &x, &mut portable, (k, n));
                assert_eq!(ours, portable, "multiply_i16 {case}");
            }
            for (k, n) in [(4, 8), (32, 8), (64, 16), (92, 24), (64, 40), (36, 64)] {
                let (stride, case) = ((k + 4usize).next_multiple_of(8), format!("{name} m={m} k={k} n={n}"));
                let (mut a, x) = (integers(m * stride, 32_700, 1), codes(k * n, 2));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
                Portable::multiply_codes(&a, stride, &x, &mut portable, (k, n));
                M::order_columns(&mut a);
                M::multiply_codes(&a, stride, &x, &mut ours, (k, n));
                assert_eq!(ours, portable, "multiply_codes {case}");
            }
            for (k, n) in [(64, 1), (64, 2), (128, 3), (192, 4), (64, 7), (1024, 5)] {
                // Again no sum may exceed 32 bits.
                let largest = 32_700.min(8_400_000 / k as i32);
                let case = format!("{name} m={m} k={k} n={n}");
                let (a, b) = (integers(m * k, largest, 5), codes(n * k, 6));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
                M::dot_codes(&a, &b, &mut ours, (k, n));
                Portable::dot_codes(&a, &b, &mut portable, (k, n));
                assert_eq!(ours, portable, "dot_codes {case}");
            }
            // Odd k among them: of the drift, k is the number of blocks.
            for (k, n) in [(1, 8), (3, 40), (32, 8), (64, 16), (96, 24), (64, 40), (32, 64)] {
                let case = format!("{name} m={m} k={k} n={n}");
                let (a, x) = (floats(m * k, 3), floats(k * n, 4));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7.0; m * n]);
                M::multiply(&a, &x, &mut ours, (k, n));
                Portable::multiply(&a, &x, &mut portable, (k, n));
                assert_eq!(ours, portable, "multiply {case}");
            }
            for (k, n) in [(32, 1), (64, 2), (32, 3), (96, 4), (64, 7), (8, 5), (40, 6)] {
                let case = format!("{name} m={m} k={k} n={n}");
                let (a, b) = (floats(m * k, 7), floats(n * k, 8));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7.0; m * n]);
                M::dot(&a, &b, &mut ours, (k, n));
                Portable::dot(&a, &b, &mut portable, (k, n));
                // The order of summation is free: an error of a few units in the last place of Σ |a|·|b|.
                let bound = 1e-6 * k as f32 * 1.5e8;
                for (ours, portable) in ours.iter().zip(&portable) {
                    assert!((ours - portable).abs() <= bound, "dot {case}: {ours} for {portable}");
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_portable_text() {
        for isa in available_isas() {
            match isa {
                Isa::Portable => {}
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => agrees_with_portable::<super::super::multiply_x86::Avx2>(isa.name()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => agrees_with_portable::<super::super::multiply_x86::Avx512>(isa.name()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Vnni => agrees_with_portable::<super::super::multiply_x86::Avx512Vnni>(isa.name()),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => agrees_with_portable::<super::super::multiply_neon::Neon>(isa.name()),
            }
        }
    }
}
