//! The products that coding and attention spend their time in.

use super::floats::{Floats, UnpackSides};
use super::multiply_codes::MultiplyCodes;
use super::unpack_codes::UnpackCodes;
use crate::lanes::WIDE;

/// The matrix products, and the vectors, of one instruction set.
///
/// All matrices are row-major. Entries of [`Multiply::multiply`] are one chain of fused multiply-adds in rising k and
/// integer entries are exact, so every instruction set gives the same bits of them.
pub(crate) trait Multiply: MultiplyCodes + UnpackCodes {
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

/// Calls a loop on vectors of sixteen where `$n` values are whole vectors of them, else on vectors of eight.
macro_rules! on_widest {
    ($n:expr, $loop:ident::<$isa:ident>($($argument:expr),*)) => {
        if $n.is_multiple_of(WIDE) {
            $loop::<$isa::F32x16, WIDE>($($argument),*)
        } else {
            $loop::<$isa::F32x8, LANES>($($argument),*)
        }
    };
}
pub(crate) use on_widest;

/// Panics unless the slices have the lengths that the shape asks for: the bounds that unchecked loads rely on.
#[inline(always)]
pub(crate) fn check_shape(a: &[f32], x: &[f32], out: &[f32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && n.is_multiple_of(8) && out.len().is_multiple_of(n));
    let m = out.len() / n;
    assert!(a.len() >= m * k && x.len() >= k * n);
    m
}

/// As [`check_shape`], for [`Multiply::dot`].
#[inline(always)]
pub(crate) fn check_dot(a: &[f32], b: &[f32], out: &[f32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && out.len().is_multiple_of(n) && k.is_multiple_of(8));
    let m = out.len() / n;
    assert!(a.len() >= m * k && b.len() >= n * k);
    m
}

/// As [`check_shape`], for [`Multiply::multiply_i16`].
#[inline(always)]
pub(crate) fn check_pairs(
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
