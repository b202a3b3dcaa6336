//! [`Floats`] in a register of AVX2, and in one of AVX-512.

use std::arch::x86_64::*;

use super::registers::with_registers;
use super::sums::total_256;
use crate::format::gain::{BlockGain, FALL_OF_ZERO, GAINS_OF_AN_OCTAVE, GUARD_SCALES};
use crate::lanes::{LANES, WIDE};
use crate::simd::floats::{Floats, UnpackSides};

/// The entries of a table of sixteen; indices 0 to 15.
#[target_feature(enable = "avx2")]
#[inline]
fn lookup_16(table: &[f32], indices: __m256i) -> __m256 {
    let (low, high) = table.split_at(LANES);
    let (low, high) = (&low[..LANES], &high[..LANES]);
    // SAFETY: both slices hold eight values.
    let (low, high) = unsafe { (_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())) };
    // A permutation looks at three bits; the fourth chooses between two of them.
    _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, indices),
        _mm256_permutevar8x32_ps(high, indices),
        _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices)),
    )
}

/// As [`UnpackSides::unpack_sides`]; the arithmetic is that of [`crate::format::gain::gain`].
#[target_feature(enable = "avx2")]
#[inline]
fn unpack_eight_sides(block: BlockGain, sides: &[u8; LANES]) -> (__m256, __m256) {
    // SAFETY: eight bytes are read.
    let sides = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(sides.as_ptr().cast()) });
    let scales = lookup_16(&GUARD_SCALES, _mm256_srli_epi32::<4>(sides));
    let falls = _mm256_and_si256(sides, _mm256_set1_epi32(15));
    let below = _mm256_sll_epi32(falls, _mm_cvtsi32_si128(i32::from(block.spacing)));
    let codes = _mm256_sub_epi32(_mm256_set1_epi32(i32::from(block.code)), below);
    let codes = _mm256_max_epi32(codes, _mm256_set1_epi32(1));
    let (low, high) = GAINS_OF_AN_OCTAVE.split_at(2 * LANES);
    let of_an_octave = _mm256_blendv_ps(
        lookup_16(low, codes),
        lookup_16(high, codes),
        _mm256_castsi256_ps(_mm256_slli_epi32::<27>(codes)),
    );
    let octaves = _mm256_sub_epi32(_mm256_srli_epi32::<5>(codes), _mm256_set1_epi32(64));
    let gains = _mm256_add_epi32(_mm256_castps_si256(of_an_octave), _mm256_slli_epi32::<23>(octaves));
    let is_zero = _mm256_cmpeq_epi32(falls, _mm256_set1_epi32(i32::from(FALL_OF_ZERO)));
    (_mm256_castsi256_ps(_mm256_andnot_si256(is_zero, gains)), scales)
}

/// The largest of eight lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn largest_256(lanes: __m256) -> f32 {
    let halves = _mm_max_ps(_mm256_extractf128_ps::<1>(lanes), _mm256_castps256_ps128(lanes));
    let pairs = _mm_max_ps(_mm_movehl_ps(halves, halves), halves);
    _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps::<1>(pairs, pairs), pairs))
}

/// Integers of 32 bits to 16, all within range.
#[target_feature(enable = "avx2")]
#[inline]
fn narrowed(integers: __m256i) -> __m128i {
    _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers))
}

/// The sum of sixteen lanes.
#[target_feature(enable = "avx512f,avx512dq,avx2")]
#[inline]
fn total_512(lanes: __m512) -> f32 {
    total_256(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes)))
}

/// The largest of sixteen lanes.
#[target_feature(enable = "avx512f,avx512dq,avx2")]
#[inline]
fn largest_512(lanes: __m512) -> f32 {
    largest_256(_mm256_max_ps(_mm512_extractf32x8_ps::<1>(lanes), _mm512_castps512_ps256(lanes)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn abs_256(lanes: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), lanes)
}

#[target_feature(enable = "avx2")]
#[inline]
fn reversed_256(lanes: __m256) -> __m256 {
    _mm256_permutevar8x32_ps(lanes, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn reversed_512(lanes: __m512) -> __m512 {
    let order = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_permutexvar_ps(order, lanes)
}

/// [`Floats`] by one intrinsic each.
macro_rules! floats {
    ($type:ty, $n:ident, $splat:ident, $load:ident, $load_int:ident, $to_float:ident, $store:ident,
     $to_int:ident, $narrowed:ident, $store_int:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident,
     $mul_sub:ident, $abs:ident, $max:ident, $reversed:ident, $total:ident, $largest:ident) => {
        impl Floats<$n> for $type {
            #[inline(always)]
            fn splat(value: f32) -> Self {
                with_registers!($splat(value))
            }

            #[inline(always)]
            fn load(from: &[f32; $n]) -> Self {
                with_registers!($load(from.as_ptr()))
            }

            #[inline(always)]
            fn load_i32(from: &[i32; $n]) -> Self {
                with_registers!($to_float($load_int(from.as_ptr().cast())))
            }

            #[inline(always)]
            fn store(self, to: &mut [f32; $n]) {
                with_registers!($store(to.as_mut_ptr(), self));
            }

            #[inline(always)]
            fn store_i16(self, to: &mut [i16; $n]) {
                with_registers!($store_int(to.as_mut_ptr().cast(), $narrowed($to_int(self))));
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                with_registers!($add(self, other))
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                with_registers!($sub(self, other))
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                with_registers!($mul(self, other))
            }

            #[inline(always)]
            fn mul_add(self, factor: Self, summand: Self) -> Self {
                with_registers!($mul_add(self, factor, summand))
            }

            #[inline(always)]
            fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
                with_registers!($mul_sub(self, factor, subtrahend))
            }

            #[inline(always)]
            fn abs(self) -> Self {
                with_registers!($abs(self))
            }

            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                with_registers!($max(self, other))
            }

            #[inline(always)]
            fn reversed(self) -> Self {
                with_registers!($reversed(self))
            }

            #[inline(always)]
            fn total(self) -> f32 {
                with_registers!($total(self))
            }

            #[inline(always)]
            fn largest(self) -> f32 {
                with_registers!($largest(self))
            }
        }
    };
}

floats!(
    __m256,
    LANES,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_loadu_si256,
    _mm256_cvtepi32_ps,
    _mm256_storeu_ps,
    _mm256_cvtps_epi32,
    narrowed,
    _mm_storeu_si128,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_fmsub_ps,
    abs_256,
    _mm256_max_ps,
    reversed_256,
    total_256,
    largest_256
);
floats!(
    __m512,
    WIDE,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_loadu_si512,
    _mm512_cvtepi32_ps,
    _mm512_storeu_ps,
    _mm512_cvtps_epi32,
    _mm512_cvtsepi32_epi16,
    _mm256_storeu_si256,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_fmsub_ps,
    _mm512_abs_ps,
    _mm512_max_ps,
    reversed_512,
    total_512,
    largest_512
);

impl UnpackSides for __m256 {
    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        with_registers!(unpack_eight_sides(block, sides))
    }
}
