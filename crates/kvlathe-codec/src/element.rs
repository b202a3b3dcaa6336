//! The number formats in which models hand over keys and values.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::aligned::Aligned;
use crate::dispatch;
use crate::error::Result;
use crate::kernels::widen::widen;
use crate::simd::isa::best_isa;

/// What [`Element::widen`] copies.
const WIDENED: &str = "numbers in float32";

/// A floating-point element of a key or value tensor.
pub trait Element: bytemuck::Pod + Default + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// Name as in torch.
    const NAME: &'static str;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// A run of values as f32: the run itself, or a copy in `buffer`.
    ///
    /// # Errors
    /// No memory for the copy.
    fn widen<'a>(values: &'a [Self], buffer: &'a mut Aligned<f32>) -> Result<&'a [f32]>;
}

impl Element for f32 {
    const NAME: &'static str = "float32";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn widen<'a>(values: &'a [Self], _: &'a mut Aligned<f32>) -> Result<&'a [f32]> {
        Ok(values)
    }
}

impl Element for bf16 {
    const NAME: &'static str = "bfloat16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        widen(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn widen<'a>(values: &'a [Self], buffer: &'a mut Aligned<f32>) -> Result<&'a [f32]> {
        buffer.resize(values.len(), WIDENED)?;
        dispatch::widen_bf16(best_isa(), values, buffer);
        Ok(buffer)
    }
}

impl Element for f16 {
    const NAME: &'static str = "float16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Decoding may overshoot the largest float16 by the quantiser's error; infinity would poison a softmax.
        Self::from_f32(value.clamp(-65504.0, 65504.0))
    }
    fn widen<'a>(values: &'a [Self], buffer: &'a mut Aligned<f32>) -> Result<&'a [f32]> {
        buffer.resize(values.len(), WIDENED)?;
        values.convert_to_f32_slice(buffer); // many at once, where the CPU can
        Ok(buffer)
    }
}
