//! Tiles of NEON.
//!
//! A register has four numbers, and there are 32: a tile of six rows and twice eight columns takes 24 for its sums.

use std::arch::aarch64::*;

use super::registers::{Octet, with_neon};
use crate::simd::isa::Neon;
use crate::simd::multiply_codes::QUAD;
use crate::simd::tiles::{Columns, Rows};

/// sums + eight numbers times lane `LANE` of four integers, in 32 bits.
#[target_feature(enable = "neon")]
#[inline]
fn add_lane_products<const LANE: i32>(
    [low, high]: Octet<int32x4_t>,
    numbers: int16x8_t,
    four: int16x4_t,
) -> Octet<int32x4_t> {
    [
        vmlal_lane_s16::<LANE>(low, vget_low_s16(numbers), four),
        vmlal_high_lane_s16::<LANE>(high, numbers, four),
    ]
}

/// sum + a · b, in 32 bits.
#[target_feature(enable = "neon")]
#[inline]
fn add_products(sum: int32x4_t, a: int16x8_t, b: int16x8_t) -> int32x4_t {
    vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b)
}

/// Eight codes as 16-bit integers.
#[target_feature(enable = "neon")]
#[inline]
fn widened(codes: uint8x8_t) -> int16x8_t {
    vreinterpretq_s16_u16(vmovl_u8(codes))
}

impl Columns<f32, f32> for Neon {
    const LANES: usize = 8;
    const STEP: usize = 1;
    const TALLEST: usize = 6;
    type Out = f32;
    type Sum = Octet<float32x4_t>;
    type Values = Octet<float32x4_t>;
    type Factor = f32;
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> Octet<float32x4_t> {
        with_neon!([vdupq_n_f32(0.0); 2])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Octet<float32x4_t> {
        with_neon!([vld1q_f32(from), vld1q_f32(from.add(4))])
    }

    #[inline(always)]
    unsafe fn factor(from: *const f32) -> f32 {
        with_neon!(*from)
    }

    #[inline(always)]
    fn add(sum: Octet<float32x4_t>, values: Octet<float32x4_t>, factor: f32) -> Octet<float32x4_t> {
        with_neon!([vfmaq_n_f32(sum[0], values[0], factor), vfmaq_n_f32(sum[1], values[1], factor)])
    }

    #[inline(always)]
    unsafe fn store(sum: Octet<float32x4_t>, to: *mut f32) {
        with_neon!({
            vst1q_f32(to, sum[0]);
            vst1q_f32(to.add(4), sum[1]);
        });
    }
}

impl Columns<i16, i16> for Neon {
    const LANES: usize = 8;
    const STEP: usize = 2;
    const TALLEST: usize = 6;
    type Out = i32;
    type Sum = Octet<int32x4_t>;
    /// The numbers of even place and those between.
    type Values = int16x8x2_t;
    /// A pair, twice.
    type Factor = int16x4_t;
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> Octet<int32x4_t> {
        with_neon!([vdupq_n_s32(0); 2])
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> int16x8x2_t {
        with_neon!(vld2q_s16(from))
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> int16x4_t {
        with_neon!(vreinterpret_s16_s32(vdup_n_s32(from.cast::<i32>().read_unaligned())))
    }

    #[inline(always)]
    fn add(sum: Octet<int32x4_t>, int16x8x2_t(even, odd): int16x8x2_t, pair: int16x4_t) -> Octet<int32x4_t> {
        with_neon!(add_lane_products::<1>(add_lane_products::<0>(sum, even, pair), odd, pair))
    }

    #[inline(always)]
    unsafe fn store(sum: Octet<int32x4_t>, to: *mut i32) {
        with_neon!({
            vst1q_s32(to, sum[0]);
            vst1q_s32(to.add(4), sum[1]);
        });
    }
}

/// Codes become 16-bit integers on the way.
impl Columns<i16, u8> for Neon {
    const LANES: usize = 8;
    const STEP: usize = QUAD;
    const TALLEST: usize = 5;
    type Out = i32;
    type Sum = Octet<int32x4_t>;
    type Values = [int16x8_t; QUAD];
    type Factor = int16x4_t;
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> Octet<int32x4_t> {
        with_neon!([vdupq_n_s32(0); 2])
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [int16x8_t; QUAD] {
        with_neon!({
            let uint8x8x4_t(c0, c1, c2, c3) = vld4_u8(from);
            [widened(c0), widened(c1), widened(c2), widened(c3)]
        })
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> int16x4_t {
        with_neon!(vld1_s16(from))
    }

    #[inline(always)]
    fn add(sum: Octet<int32x4_t>, codes: [int16x8_t; QUAD], four: int16x4_t) -> Octet<int32x4_t> {
        with_neon!({
            let sum = add_lane_products::<0>(sum, codes[0], four);
            let sum = add_lane_products::<1>(sum, codes[1], four);
            let sum = add_lane_products::<2>(sum, codes[2], four);
            add_lane_products::<3>(sum, codes[3], four)
        })
    }

    #[inline(always)]
    unsafe fn store(sum: Octet<int32x4_t>, to: *mut i32) {
        with_neon!({
            vst1q_s32(to, sum[0]);
            vst1q_s32(to.add(4), sum[1]);
        });
    }
}

impl Rows<f32, f32> for Neon {
    const LANES: usize = 4;
    const TALLEST: usize = 4;
    type Out = f32;
    type Sum = float32x4_t;
    type Values = float32x4_t;
    type Factors = float32x4_t;

    #[inline(always)]
    fn zero() -> float32x4_t {
        with_neon!(vdupq_n_f32(0.0))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        with_neon!(vld1q_f32(from))
    }

    #[inline(always)]
    unsafe fn factors(from: *const f32) -> float32x4_t {
        with_neon!(vld1q_f32(from))
    }

    #[inline(always)]
    fn add(sum: float32x4_t, values: float32x4_t, factors: float32x4_t) -> float32x4_t {
        with_neon!(vfmaq_f32(sum, factors, values))
    }

    #[inline(always)]
    fn total(sum: float32x4_t) -> f32 {
        with_neon!(vaddvq_f32(sum))
    }

    #[inline(always)]
    fn add_one(total: f32, a: f32, b: f32) -> f32 {
        a.mul_add(b, total)
    }
}

impl Rows<i16, u8> for Neon {
    const LANES: usize = 8;
    const TALLEST: usize = 4;
    type Out = i32;
    type Sum = int32x4_t;
    type Values = int16x8_t;
    type Factors = int16x8_t;

    #[inline(always)]
    fn zero() -> int32x4_t {
        with_neon!(vdupq_n_s32(0))
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> int16x8_t {
        with_neon!(widened(vld1_u8(from)))
    }

    #[inline(always)]
    unsafe fn factors(from: *const i16) -> int16x8_t {
        with_neon!(vld1q_s16(from))
    }

    #[inline(always)]
    fn add(sum: int32x4_t, values: int16x8_t, factors: int16x8_t) -> int32x4_t {
        with_neon!(add_products(sum, factors, values))
    }

    #[inline(always)]
    fn total(sum: int32x4_t) -> i32 {
        with_neon!(vaddvq_s32(sum))
    }

    #[inline(always)]
    fn add_one(total: i32, a: i16, b: u8) -> i32 {
        total + i32::from(a) * i32::from(b)
    }
}
