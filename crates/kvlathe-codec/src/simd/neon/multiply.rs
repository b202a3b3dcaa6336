//! The products of NEON.

use std::arch::aarch64::float32x4x2_t;

use crate::simd::floats::Two;
use crate::simd::isa::Neon;
use crate::simd::multiply::{Multiply, check_dot, check_pairs, check_shape};
use crate::simd::multiply_codes::{MultiplyCodes, check_columns, check_rows};
use crate::simd::tiles::{self, tiled_products};

/// Codes are multiplied in the order in which they lie.
#[inline(always)]
fn as_they_are(_: &mut [i16]) {}

tiled_products!(Neon, "neon", float32x4x2_t, Two<float32x4x2_t>, as_they_are);
