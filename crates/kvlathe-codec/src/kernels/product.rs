//! Products by themselves: of matrices, for exact parts of a cache, and of two vectors.

use crate::lanes::groups;
use crate::simd::floats::Floats;
use crate::simd::multiply::Multiply;

/// out[m, n] = a[m, k] · x[k, n]; panics unless the lengths fit (n a multiple of eight).
#[inline(always)]
pub(crate) fn product<M: Multiply>(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
    M::multiply(a, x, out, shape);
}

/// out[m, n] = a[m, k] · b[n, k]ᵀ; panics unless the lengths fit (k a multiple of eight).
#[inline(always)]
pub(crate) fn row_products<M: Multiply>(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
    M::dot(a, b, out, shape);
}

/// Σ aₜ·bₜ over a multiple of N, N partial sums side by side.
#[inline(always)]
pub(crate) fn dot<V: Floats<N>, const N: usize>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = V::splat(0.0);
    let a = groups(a);
    let b = &groups(b)[..a.len()];
    for g in 0..a.len() {
        sums = V::load(&a[g]).mul_add(V::load(&b[g]), sums);
    }
    sums.total()
}
