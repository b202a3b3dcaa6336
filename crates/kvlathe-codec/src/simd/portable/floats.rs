//! [`Floats`] in arrays: what registers are tested against.

use crate::format::gain::BlockGain;
use crate::lanes::{self, LANES, ROUND};
use crate::simd::floats::{Floats, UnpackSides};

/// Applies `$value` to each lane `$l`.
macro_rules! each_lane {
    ($l:ident => $value:expr) => {{
        let mut lanes = [0.0f32; N];
        for $l in 0..N {
            lanes[$l] = $value;
        }
        lanes
    }};
}

impl<const N: usize> Floats<N> for [f32; N] {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; N]
    }

    #[inline(always)]
    fn load(from: &[f32; N]) -> Self {
        *from
    }

    #[inline(always)]
    fn load_i32(from: &[i32; N]) -> Self {
        each_lane!(l => from[l] as f32)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; N]) {
        *to = self;
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; N]) {
        for l in 0..N {
            to[l] = (self[l] + ROUND).to_bits() as i16;
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        each_lane!(l => self[l] + other[l])
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        each_lane!(l => self[l] - other[l])
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        each_lane!(l => self[l] * other[l])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        each_lane!(l => self[l].mul_add(factor[l], summand[l]))
    }

    #[inline(always)]
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
        each_lane!(l => self[l].mul_add(factor[l], -subtrahend[l]))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        each_lane!(l => self[l].abs())
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        each_lane!(l => lanes::larger(self[l], other[l]))
    }

    #[inline(always)]
    fn reversed(self) -> Self {
        each_lane!(l => self[N - 1 - l])
    }

    #[inline(always)]
    fn total(self) -> f32 {
        lanes::total(self)
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        lanes::largest(self)
    }
}

impl UnpackSides for [f32; LANES] {
    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        let (mut gains, mut scales) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            (gains[l], scales[l]) = block.unpack_side(sides[l]);
        }
        (gains, scales)
    }
}
