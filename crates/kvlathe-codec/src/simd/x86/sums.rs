//! Sums of lanes, and of products of pairs of integers.

use std::arch::asm;
use std::arch::x86_64::*;

/// The sum of eight lanes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn total_256(lanes: __m256) -> f32 {
    let halves = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps::<1>(pairs, pairs)))
}

/// As [`total_256`], for integers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn int_total_256(lanes: __m256i) -> i32 {
    let halves = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    let pairs = _mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves));
    _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32::<1>(pairs)))
}

/// sum + the sums of products of neighbouring 16-bit integers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pair_sum_256(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
}

/// As [`pair_sum_256`], in 512 bits.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn pair_sum_512(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
}

/// As [`pair_sum_512`], in one instruction.
///
/// Not the intrinsic: without knowing the processor, LLVM turns half of these back into a product and a sum, as some
/// processors have the sum of a chain sooner that way. Tiles have chains enough.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn pair_sum_vnni(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    let mut result = sum;
    // SAFETY: the instruction reads and writes registers only, and VNNI is enabled.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) result,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    result
}
