//! Tiles of AVX2.

use std::arch::x86_64::*;

use super::registers::with_registers;
use super::sums::{int_total_256, pair_sum_256, total_256};
use crate::simd::isa::Avx2;
use crate::simd::multiply_codes::QUAD;
use crate::simd::tiles::{Columns, Rows};

impl Columns<f32, f32> for Avx2 {
    const LANES: usize = 8;
    const STEP: usize = 1;
    const TALLEST: usize = 6;
    type Out = f32;
    type Sum = __m256;
    type Values = __m256;
    type Factor = __m256;
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> __m256 {
        with_registers!(_mm256_setzero_ps())
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        with_registers!(_mm256_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn factor(from: *const f32) -> __m256 {
        with_registers!(_mm256_set1_ps(*from))
    }

    #[inline(always)]
    fn add(sum: __m256, values: __m256, factor: __m256) -> __m256 {
        with_registers!(_mm256_fmadd_ps(factor, values, sum))
    }

    #[inline(always)]
    unsafe fn store(sum: __m256, to: *mut f32) {
        with_registers!(_mm256_storeu_ps(to, sum));
    }
}

impl Columns<i16, i16> for Avx2 {
    const LANES: usize = 8;
    const STEP: usize = 2;
    const TALLEST: usize = 6;
    type Out = i32;
    type Sum = __m256i;
    type Values = __m256i;
    /// A pair in all lanes.
    type Factor = __m256i;
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> __m256i {
        with_registers!(_mm256_setzero_si256())
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> __m256i {
        with_registers!(_mm256_loadu_si256(from.cast()))
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> __m256i {
        with_registers!(_mm256_set1_epi32(from.cast::<i32>().read_unaligned()))
    }

    #[inline(always)]
    fn add(sum: __m256i, values: __m256i, factor: __m256i) -> __m256i {
        with_registers!(pair_sum_256(sum, values, factor))
    }

    #[inline(always)]
    unsafe fn store(sum: __m256i, to: *mut i32) {
        with_registers!(_mm256_storeu_si256(to.cast(), sum));
    }
}

/// Codes become 16-bit integers on the way.
impl Columns<i16, u8> for Avx2 {
    const LANES: usize = 8;
    const STEP: usize = QUAD;
    const TALLEST: usize = 4;
    type Out = i32;
    type Sum = __m256i;
    /// The even bytes and the odd ones.
    type Values = [__m256i; 2];
    /// The pairs that meet them, in all lanes.
    type Factor = [__m256i; 2];
    type Narrow = Self;

    #[inline(always)]
    fn zero() -> __m256i {
        with_registers!(_mm256_setzero_si256())
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m256i; 2] {
        with_registers!({
            let codes = _mm256_loadu_si256(from.cast());
            [_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(codes)]
        })
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> [__m256i; 2] {
        with_registers!({
            let pairs = from.cast::<i32>();
            [_mm256_set1_epi32(pairs.read_unaligned()), _mm256_set1_epi32(pairs.add(1).read_unaligned())]
        })
    }

    #[inline(always)]
    fn add(sum: __m256i, [even, odd]: [__m256i; 2], [first, second]: [__m256i; 2]) -> __m256i {
        with_registers!(pair_sum_256(pair_sum_256(sum, even, first), odd, second))
    }

    #[inline(always)]
    unsafe fn store(sum: __m256i, to: *mut i32) {
        with_registers!(_mm256_storeu_si256(to.cast(), sum));
    }
}

impl Rows<f32, f32> for Avx2 {
    const LANES: usize = 8;
    const TALLEST: usize = 2;
    type Out = f32;
    type Sum = __m256;
    type Values = __m256;
    type Factors = __m256;

    #[inline(always)]
    fn zero() -> __m256 {
        with_registers!(_mm256_setzero_ps())
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        with_registers!(_mm256_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn factors(from: *const f32) -> __m256 {
        with_registers!(_mm256_loadu_ps(from))
    }

    #[inline(always)]
    fn add(sum: __m256, values: __m256, factors: __m256) -> __m256 {
        with_registers!(_mm256_fmadd_ps(factors, values, sum))
    }

    #[inline(always)]
    fn total(sum: __m256) -> f32 {
        with_registers!(total_256(sum))
    }

    #[inline(always)]
    fn add_one(total: f32, a: f32, b: f32) -> f32 {
        a.mul_add(b, total)
    }
}

impl Rows<i16, u8> for Avx2 {
    const LANES: usize = 16;
    const TALLEST: usize = 2;
    type Out = i32;
    type Sum = __m256i;
    type Values = __m256i;
    type Factors = __m256i;

    #[inline(always)]
    fn zero() -> __m256i {
        with_registers!(_mm256_setzero_si256())
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        with_registers!(_mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast())))
    }

    #[inline(always)]
    unsafe fn factors(from: *const i16) -> __m256i {
        with_registers!(_mm256_loadu_si256(from.cast()))
    }

    #[inline(always)]
    fn add(sum: __m256i, values: __m256i, factors: __m256i) -> __m256i {
        with_registers!(pair_sum_256(sum, values, factors))
    }

    #[inline(always)]
    fn total(sum: __m256i) -> i32 {
        with_registers!(int_total_256(sum))
    }

    #[inline(always)]
    fn add_one(total: i32, a: i16, b: u8) -> i32 {
        total + i32::from(a) * i32::from(b)
    }
}
