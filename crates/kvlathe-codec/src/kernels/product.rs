//! Products by themselves: of matrices, for exact parts of a cache, and of two vectors.

use half::bf16;

use super::floats::Floats;
use super::lanes::groups;
use super::multiply::Multiply;
use crate::element::Element;

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

/// Widens numbers in bfloat16.
#[inline(always)]
pub(super) fn widen_bf16<M: Multiply>(from: &[bf16], to: &mut [f32]) {
    let from = &from[..to.len()];
    for i in 0..to.len() {
        to[i] = Element::to_f32(from[i]);
    }
}

/// Σ aₜ·bₜ over a multiple of N, N partial sums side by side.
#[inline(always)]
pub(super) fn dot<V: Floats<N>, const N: usize>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = V::splat(0.0);
    let a = groups(a);
    let b = &groups(b)[..a.len()];
    for g in 0..a.len() {
        sums = V::load(&a[g]).mul_add(V::load(&b[g]), sums);
    }
    sums.total()
}
