//! The matrix product by itself, for exact parts of a cache.

use super::multiply::Multiply;

/// out[m, n] = a[m, k] · x[k, n]; panics unless the lengths fit (n a multiple of eight).
#[inline(always)]
pub(super) fn product<M: Multiply>(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
    M::multiply(a, x, out, shape);
}
