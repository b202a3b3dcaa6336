//! The products in plain loops: what those in intrinsics are tested against.

use crate::lanes::{LANES, WIDE};
use crate::simd::isa::Portable;
use crate::simd::multiply::{Multiply, check_dot, check_pairs, check_shape};
use crate::simd::multiply_codes::{MultiplyCodes, QUAD, check_columns, check_rows};

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

impl MultiplyCodes for Portable {
    #[inline(always)]
    fn order_columns(_: &mut [i16]) {}

    #[inline(always)]
    fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
        let m = check_columns(a, a_stride, x, out, (k, n));
        for i in 0..m {
            let sums = &mut out[i * n..(i + 1) * n];
            sums.fill(0);
            for j in (0..k).step_by(QUAD) {
                let a = &a[i * a_stride + j..][..QUAD];
                for (sum, codes) in sums.iter_mut().zip(x[j * n..(j + QUAD) * n].chunks_exact(QUAD)) {
                    for r in 0..QUAD {
                        *sum += i32::from(a[r]) * i32::from(codes[r]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
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
