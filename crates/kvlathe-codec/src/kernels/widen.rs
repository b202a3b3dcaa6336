//! Widening of bfloat16, exactly.

use half::bf16;

use crate::simd::multiply::Multiply;

/// One number.
#[inline(always)]
pub(crate) fn widen(number: bf16) -> f32 {
    f32::from_bits(u32::from(number.to_bits()) << 16)
}

/// As many of `from` as of `to`.
#[inline(always)]
pub(crate) fn widen_bf16<M: Multiply>(from: &[bf16], to: &mut [f32]) {
    let from = &from[..to.len()];
    for i in 0..to.len() {
        to[i] = widen(from[i]);
    }
}
