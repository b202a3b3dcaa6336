//! Tiles of AVX-512, with VNNI and without.

use std::arch::x86_64::*;

use super::registers::with_registers;
use super::sums::{pair_sum_512, pair_sum_vnni};
use crate::simd::isa::{Avx2, Avx512, Avx512Vnni};
use crate::simd::multiply_codes::QUAD;
use crate::simd::tiles::{Columns, Rows};

/// What the two do differently.
trait Pairs512 {
    /// sum + the sums of products of neighbouring 16-bit integers.
    fn pair_sum(sum: __m512i, a: __m512i, b: __m512i) -> __m512i;
}

impl Pairs512 for Avx512 {
    #[inline(always)]
    fn pair_sum(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        with_registers!(pair_sum_512(sum, a, b))
    }
}

impl Pairs512 for Avx512Vnni {
    #[inline(always)]
    fn pair_sum(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        with_registers!(pair_sum_vnni(sum, a, b))
    }
}

impl<S: Pairs512> Columns<f32, f32> for S {
    const LANES: usize = 16;
    const STEP: usize = 1;
    const TALLEST: usize = 12;
    type Out = f32;
    type Sum = __m512;
    type Values = __m512;
    type Factor = __m512;
    type Narrow = Avx2;

    #[inline(always)]
    fn zero() -> __m512 {
        with_registers!(_mm512_setzero_ps())
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        with_registers!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn factor(from: *const f32) -> __m512 {
        with_registers!(_mm512_set1_ps(*from))
    }

    #[inline(always)]
    fn add(sum: __m512, values: __m512, factor: __m512) -> __m512 {
        with_registers!(_mm512_fmadd_ps(factor, values, sum))
    }

    #[inline(always)]
    unsafe fn store(sum: __m512, to: *mut f32) {
        with_registers!(_mm512_storeu_ps(to, sum));
    }
}

impl<S: Pairs512> Columns<i16, i16> for S {
    const LANES: usize = 16;
    const STEP: usize = 2;
    const TALLEST: usize = 12;
    type Out = i32;
    type Sum = __m512i;
    type Values = __m512i;
    /// A pair in all lanes.
    type Factor = __m512i;
    type Narrow = Avx2;

    #[inline(always)]
    fn zero() -> __m512i {
        with_registers!(_mm512_setzero_si512())
    }

    #[inline(always)]
    unsafe fn load(from: *const i16) -> __m512i {
        with_registers!(_mm512_loadu_si512(from.cast()))
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> __m512i {
        with_registers!(_mm512_set1_epi32(from.cast::<i32>().read_unaligned()))
    }

    #[inline(always)]
    fn add(sum: __m512i, values: __m512i, factor: __m512i) -> __m512i {
        S::pair_sum(sum, values, factor)
    }

    #[inline(always)]
    unsafe fn store(sum: __m512i, to: *mut i32) {
        with_registers!(_mm512_storeu_si512(to.cast(), sum));
    }
}

/// Codes become 16-bit integers on the way.
impl<S: Pairs512> Columns<i16, u8> for S {
    const LANES: usize = 16;
    const STEP: usize = QUAD;
    const TALLEST: usize = 8;
    type Out = i32;
    type Sum = __m512i;
    /// The even bytes and the odd ones.
    type Values = [__m512i; 2];
    /// The pairs that meet them, in all lanes.
    type Factor = [__m512i; 2];
    type Narrow = Avx2;

    #[inline(always)]
    fn zero() -> __m512i {
        with_registers!(_mm512_setzero_si512())
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m512i; 2] {
        with_registers!({
            let codes = _mm512_loadu_si512(from.cast());
            [_mm512_and_si512(codes, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(codes)]
        })
    }

    #[inline(always)]
    unsafe fn factor(from: *const i16) -> [__m512i; 2] {
        with_registers!({
            let pairs = from.cast::<i32>();
            [_mm512_set1_epi32(pairs.read_unaligned()), _mm512_set1_epi32(pairs.add(1).read_unaligned())]
        })
    }

    #[inline(always)]
    fn add(sum: __m512i, [even, odd]: [__m512i; 2], [first, second]: [__m512i; 2]) -> __m512i {
        S::pair_sum(S::pair_sum(sum, even, first), odd, second)
    }

    #[inline(always)]
    unsafe fn store(sum: __m512i, to: *mut i32) {
        with_registers!(_mm512_storeu_si512(to.cast(), sum));
    }
}

impl<S: Pairs512> Rows<f32, f32> for S {
    const LANES: usize = 16;
    const TALLEST: usize = 4;
    type Out = f32;
    type Sum = __m512;
    type Values = __m512;
    type Factors = __m512;

    #[inline(always)]
    fn zero() -> __m512 {
        with_registers!(_mm512_setzero_ps())
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        with_registers!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn factors(from: *const f32) -> __m512 {
        with_registers!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    fn add(sum: __m512, values: __m512, factors: __m512) -> __m512 {
        with_registers!(_mm512_fmadd_ps(factors, values, sum))
    }

    #[inline(always)]
    fn total(sum: __m512) -> f32 {
        with_registers!(_mm512_reduce_add_ps(sum))
    }

    #[inline(always)]
    fn add_one(total: f32, a: f32, b: f32) -> f32 {
        a.mul_add(b, total)
    }
}

impl<S: Pairs512> Rows<i16, u8> for S {
    const LANES: usize = 32;
    const TALLEST: usize = 4;
    type Out = i32;
    type Sum = __m512i;
    type Values = __m512i;
    type Factors = __m512i;

    #[inline(always)]
    fn zero() -> __m512i {
        with_registers!(_mm512_setzero_si512())
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        with_registers!(_mm512_cvtepu8_epi16(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn factors(from: *const i16) -> __m512i {
        with_registers!(_mm512_loadu_si512(from.cast()))
    }

    #[inline(always)]
    fn add(sum: __m512i, values: __m512i, factors: __m512i) -> __m512i {
        S::pair_sum(sum, values, factors)
    }

    #[inline(always)]
    fn total(sum: __m512i) -> i32 {
        with_registers!(_mm512_reduce_add_epi32(sum))
    }

    #[inline(always)]
    fn add_one(total: i32, a: i16, b: u8) -> i32 {
        total + i32::from(a) * i32::from(b)
    }
}
