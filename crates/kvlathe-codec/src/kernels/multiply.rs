//! The products that coding and attention spend their time in.

use super::f32x8::F32x8;

/// The matrix products, and the vectors, of one instruction set.
///
/// All matrices are row-major. Entries of [`Multiply::multiply`] are one chain of fused multiply-adds in rising k and
/// integer entries are exact, so every instruction set gives the same bits of them.
pub(super) trait Multiply {
    /// What the loops around the products use.
    type F32x8: F32x8;

    /// out[m, n] = a[m, k] · x[k, n]; `shape` is (k, n), `m = out.len() / n`, n a multiple of eight.
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · b[n, k]ᵀ: dot products of rows; `shape` is (k, n), k a multiple of eight.
    fn dot(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · x, with x as `[k/2, n, 2]`: two rows lie interleaved, as the instructions that multiply
    /// pairs of 16-bit integers want them. The rows of `a` begin `a_stride` apart; k is even, n a multiple of eight.
    fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · b[n, k]ᵀ: dot products of rows; `shape` is (k, n), k a multiple of [`DOT_STEP`].
    fn dot_i16(a: &[i16], b: &[i16], out: &mut [i32], shape: (usize, usize));
}

/// Elements that [`Multiply::dot_i16`] takes at a time.
pub(super) const DOT_STEP: usize = 32;

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

/// As [`check_shape`], for [`Multiply::dot_i16`].
#[inline(always)]
pub(super) fn check_rows(a: &[i16], b: &[i16], out: &[i32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && out.len().is_multiple_of(n) && k.is_multiple_of(DOT_STEP));
    let m = out.len() / n;
    assert!(a.len() >= m * k && b.len() >= n * k);
    m
}

/// No more than the build's target guarantees; what the others are tested against.
pub(super) struct Portable;

impl Multiply for Portable {
    type F32x8 = [f32; 8];

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

    #[inline(always)]
    fn dot_i16(a: &[i16], b: &[i16], out: &mut [i32], (k, n): (usize, usize)) {
        let m = check_rows(a, b, out, (k, n));
        for i in 0..m {
            for j in 0..n {
                let (a, b) = (&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
                let mut sum = 0;
                for t in 0..k {
                    sum += i32::from(a[t]) * i32::from(b[t]);
                }
                out[i * n + j] = sum;
            }
        }
    }
}
