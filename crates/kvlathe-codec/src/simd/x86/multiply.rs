//! The products of AVX2, AVX-512 and AVX-512 with VNNI.

use std::arch::x86_64::*;

use crate::simd::floats::Two;
use crate::simd::isa::{Avx2, Avx512, Avx512Vnni};
use crate::simd::multiply::{Multiply, check_dot, check_pairs, check_shape};
use crate::simd::multiply_codes::{MultiplyCodes, check_columns, check_rows};
use crate::simd::tiles::{self, tiled_products};

/// Of four integers each, the second and the third change places: then the two that meet even bytes come first.
#[inline(always)]
fn swap_middles(a: &mut [i16]) {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn swap(a: &mut [i16]) {
        for run in a.as_chunks_mut::<8>().0 {
            // SAFETY: sixteen bytes are read and written.
            unsafe {
                let value = _mm_loadu_si128(run.as_ptr().cast());
                let value = _mm_shufflehi_epi16::<0b11_01_10_00>(_mm_shufflelo_epi16::<0b11_01_10_00>(value));
                _mm_storeu_si128(run.as_mut_ptr().cast(), value);
            }
        }
    }
    // SAFETY: called only for types that are named only inside functions that enable these features.
    unsafe { swap(a) }
}

tiled_products!(Avx2, "avx2,fma", __m256, Two<__m256>, swap_middles);
tiled_products!(Avx512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma", __m256, __m512, swap_middles);
tiled_products!(
    Avx512Vnni,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma",
    __m256,
    __m512,
    swap_middles
);
