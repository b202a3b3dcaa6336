//! [`Floats`] in two registers of NEON.

use std::arch::aarch64::*;

use super::registers::with_neon;
use crate::format::gain::{BlockGain, FALL_OF_ZERO, GAINS_OF_AN_OCTAVE, GUARD_SCALES};
use crate::lanes::LANES;
use crate::simd::floats::{Floats, UnpackSides};

/// One operation on both registers.
macro_rules! each_half {
    ($op:ident($($from:expr),+)) => {
        with_neon!(float32x4x2_t($op($($from.0),+), $op($($from.1),+)))
    };
}

/// Where the entries of a table of numbers begin, and the bytes behind it: what TBL wants for four lanes.
#[target_feature(enable = "neon")]
#[inline]
fn byte_indices(entries: uint32x4_t) -> uint8x16_t {
    let first = vmulq_n_u32(entries, 0x0404_0404);
    vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x0302_0100)))
}

/// Sixteen numbers as the bytes that TBL looks things up in.
#[target_feature(enable = "neon")]
#[inline]
fn table_of_16(table: &[f32; 16]) -> uint8x16x4_t {
    // SAFETY: 64 bytes are read.
    unsafe { vld1q_u8_x4(table.as_ptr().cast()) }
}

/// As [`UnpackSides::unpack_sides`], for four sides in 32 bits; the arithmetic is that of [`crate::format::gain::gain`].
#[target_feature(enable = "neon")]
#[inline]
fn unpack_four_sides(block: BlockGain, sides: uint32x4_t) -> (float32x4_t, float32x4_t) {
    let guards = byte_indices(vshrq_n_u32::<4>(sides));
    let scales = vqtbl4q_u8(table_of_16(&GUARD_SCALES), guards);
    let falls = vandq_u32(sides, vdupq_n_u32(15));
    let below = vshlq_u32(falls, vdupq_n_s32(i32::from(block.spacing)));
    // Saturating: what falls below zero is zero, then one.
    let codes = vmaxq_u32(vqsubq_u32(vdupq_n_u32(u32::from(block.code)), below), vdupq_n_u32(1));
    let (low, high) = GAINS_OF_AN_OCTAVE.split_at(16);
    let (low, high) = (low.try_into().expect("sixteen"), high.try_into().expect("sixteen"));
    let at = byte_indices(vandq_u32(codes, vdupq_n_u32(31)));
    // Out of range of the first table is zero, out of range of the second leaves what the first gave.
    let of_an_octave = vqtbl4q_u8(table_of_16(low), at);
    let of_an_octave = vqtbx4q_u8(of_an_octave, table_of_16(high), vsubq_u8(at, vdupq_n_u8(64)));
    let octaves = vsubq_u32(vshrq_n_u32::<5>(codes), vdupq_n_u32(64));
    let gains = vaddq_u32(vreinterpretq_u32_u8(of_an_octave), vshlq_n_u32::<23>(octaves));
    let is_zero = vceqq_u32(falls, vdupq_n_u32(u32::from(FALL_OF_ZERO)));
    (vreinterpretq_f32_u32(vbicq_u32(gains, is_zero)), vreinterpretq_f32_u8(scales))
}

/// As [`UnpackSides::unpack_sides`].
#[target_feature(enable = "neon")]
#[inline]
fn unpack_eight_sides(block: BlockGain, sides: &[u8; LANES]) -> (float32x4x2_t, float32x4x2_t) {
    // SAFETY: eight bytes are read.
    let sides = vmovl_u8(unsafe { vld1_u8(sides.as_ptr()) });
    let (gains_0, scales_0) = unpack_four_sides(block, vmovl_u16(vget_low_u16(sides)));
    let (gains_1, scales_1) = unpack_four_sides(block, vmovl_high_u16(sides));
    (float32x4x2_t(gains_0, gains_1), float32x4x2_t(scales_0, scales_1))
}

/// `a` where it is larger, else `b`: unlike FMAX and FMAXNM with NaN and zeros of both signs.
#[target_feature(enable = "neon")]
#[inline]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// The largest of eight lanes.
#[target_feature(enable = "neon")]
#[inline]
fn largest_of_8(lanes: float32x4x2_t) -> f32 {
    let halves = larger(lanes.1, lanes.0);
    let pairs = larger(vextq_f32::<2>(halves, halves), halves);
    vgetq_lane_f32::<0>(larger(vextq_f32::<1>(pairs, pairs), pairs))
}

/// The sum of eight lanes.
#[target_feature(enable = "neon")]
#[inline]
fn total_of_8(lanes: float32x4x2_t) -> f32 {
    let halves = vaddq_f32(lanes.0, lanes.1);
    vpadds_f32(vadd_f32(vget_low_f32(halves), vget_high_f32(halves)))
}

/// The last of four lanes first.
#[target_feature(enable = "neon")]
#[inline]
fn reversed_4(lanes: float32x4_t) -> float32x4_t {
    let pairs = vrev64q_f32(lanes);
    vextq_f32::<2>(pairs, pairs)
}

impl Floats<LANES> for float32x4x2_t {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        with_neon!(float32x4x2_t(vdupq_n_f32(value), vdupq_n_f32(value)))
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        with_neon!(float32x4x2_t(vld1q_f32(from.as_ptr()), vld1q_f32(from.as_ptr().add(4))))
    }

    #[inline(always)]
    fn load_i32(from: &[i32; LANES]) -> Self {
        let integers = with_neon!(vld1q_s32_x2(from.as_ptr()));
        each_half!(vcvtq_f32_s32(integers))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        // Not `vst1q_f32_x2`, which takes neighbouring registers.
        with_neon!({
            vst1q_f32(to.as_mut_ptr(), self.0);
            vst1q_f32(to.as_mut_ptr().add(4), self.1);
        });
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        with_neon!({
            let low = vqmovn_s32(vcvtnq_s32_f32(self.0));
            vst1q_s16(to.as_mut_ptr(), vqmovn_high_s32(low, vcvtnq_s32_f32(self.1)));
        });
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        each_half!(vaddq_f32(self, other))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        each_half!(vsubq_f32(self, other))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        each_half!(vmulq_f32(self, other))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        each_half!(vfmaq_f32(summand, self, factor))
    }

    #[inline(always)]
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
        // Not FMLS and the sign turned afterwards: that makes −0 of what is 0.
        let summand: Self = each_half!(vnegq_f32(subtrahend));
        self.mul_add(factor, summand)
    }

    #[inline(always)]
    fn abs(self) -> Self {
        each_half!(vabsq_f32(self))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        each_half!(larger(self, other))
    }

    #[inline(always)]
    fn reversed(self) -> Self {
        with_neon!(float32x4x2_t(reversed_4(self.1), reversed_4(self.0)))
    }

    #[inline(always)]
    fn total(self) -> f32 {
        with_neon!(total_of_8(self))
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        with_neon!(largest_of_8(self))
    }
}

impl UnpackSides for float32x4x2_t {
    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        with_neon!(unpack_eight_sides(block, sides))
    }
}
