//! The matrix products by themselves, for exact parts of a cache.

use super::multiply::Multiply;

/// out[m, n] = a[m, k] · x[k, n]; panics unless the lengths fit (n a multiple of eight).
#[inline(always)]
pub(super) fn product<M: Multiply>(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
    M::multiply(a, x, out, shape);
}

/// out[m, n] = a[m, k] · b[n, k]ᵀ; panics unless the lengths fit (k a multiple of eight).
#[inline(always)]
pub(super) fn row_products<M: Multiply>(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
    M::dot(a, b, out, shape);
}
