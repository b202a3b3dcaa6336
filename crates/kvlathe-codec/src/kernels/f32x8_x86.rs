//! [`F32x8`] in a register of AVX2. AVX-512 uses it too: the loops are short, and whole registers of sixteen would win
//! little.

use std::arch::x86_64::*;

use super::f32x8::F32x8;
use super::lanes::LANES;
use super::multiply_x86::total_256;
use crate::gain::{BlockGain, FALL_OF_ZERO, GAINS_OF_AN_OCTAVE, GUARD_SCALES};

/// One intrinsic, or a few, as a method. All of them share one reason to be safe.
macro_rules! with_avx2 {
    ($value:expr) => {
        // SAFETY: values of this type are made only inside functions that enable AVX2 and FMA; memory is reached through
        // references to arrays of the length that is read or written.
        unsafe { $value }
    };
}

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

/// As [`F32x8::unpack_sides`]; the arithmetic is that of [`crate::gain::gain`].
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

impl F32x8 for __m256 {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        with_avx2!(_mm256_set1_ps(value))
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        with_avx2!(_mm256_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn load_i32(from: &[i32; LANES]) -> Self {
        with_avx2!(_mm256_cvtepi32_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        with_avx2!(_mm256_storeu_ps(to.as_mut_ptr(), self));
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        with_avx2!(_mm_storeu_si128(to.as_mut_ptr().cast(), narrowed(_mm256_cvtps_epi32(self))));
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        with_avx2!(_mm256_add_ps(self, other))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        with_avx2!(_mm256_sub_ps(self, other))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        with_avx2!(_mm256_mul_ps(self, other))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        with_avx2!(_mm256_fmadd_ps(self, factor, summand))
    }

    #[inline(always)]
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
        with_avx2!(_mm256_fmsub_ps(self, factor, subtrahend))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        with_avx2!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        with_avx2!(_mm256_max_ps(self, other))
    }

    #[inline(always)]
    fn reversed(self) -> Self {
        with_avx2!(_mm256_permutevar8x32_ps(self, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)))
    }

    #[inline(always)]
    fn total(self) -> f32 {
        with_avx2!(total_256(self))
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        with_avx2!(largest_256(self))
    }

    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        with_avx2!(unpack_eight_sides(block, sides))
    }
}
