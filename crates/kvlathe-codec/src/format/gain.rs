//! Side information of a token: its gain and its guard, together eight bits a token and stream.
//!
//! * **Gain.** γ = ‖x‖ / √d, coded on a log scale. A block states its largest gain, in 1/32 octaves, and how far apart the
//!   gains below it lie ([`BlockGain`]); a token says how many of those spacings it falls below the largest, in four bits.
//!   Spacings are the least that reach the block's smallest gain. The shape is x divided by the *decoded* gain, so rounding
//!   the gain is no error by itself: it only changes the shape's norm, and the coefficients absorb that.
//! * **Guard.** A factor on the token's quantiser steps, one of [`GUARD_SCALES`]. A token with an outlying coefficient
//!   takes larger steps instead of clipping.

/// Activations above this magnitude are refused; real ones stay many orders below. The squares of 1024 of them, the most
/// that a vector has, can be summed in float32.
pub const MAX_MAGNITUDE: f32 = 1e17;

/// Gain codes per octave (doubling of the gain).
const GAIN_CODES_PER_OCTAVE: f64 = 32.0;
/// The code of a gain of one.
const GAIN_CODE_OF_ONE: i32 = 2048;
/// Largest gain code. Code zero stands for the zero vector.
const MAX_GAIN_CODE: i32 = 4095;

/// The largest fall below a block's gain that a token can state; the next code is the zero vector's.
const MAX_FALL: u16 = 14;
pub(crate) const FALL_OF_ZERO: u8 = 15;

/// The factors by which a token's steps may be scaled, by guard code.
///
/// Small ones are close together because the encoder chooses among them for the least error of ordinary tokens; the
/// last ones exist so that no finite activation is ever clipped.
pub const GUARD_SCALES: [f32; 16] =
    [0.75, 0.84, 0.92, 1.0, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6.0, 24.0, 256.0, 16384.0];
/// How many guard codes the encoder tries a token: the smallest that clips nothing, and those just below it.
pub(crate) const GUARD_CANDIDATES: u8 = 5;

/// The first guard code under which no coefficient clips (the last one if none).
pub(crate) fn smallest_safe_guard(largest_ratio: f32) -> u8 {
    GUARD_SCALES.iter().position(|&s| s >= largest_ratio).unwrap_or(GUARD_SCALES.len() - 1) as u8
}

/// 2^(i/32) for a fraction of an octave; the rest of a gain code is an exponent.
pub(crate) static GAINS_OF_AN_OCTAVE: [f32; 32] = [
    1.0,
    1.021_897_2,
    1.044_273_7,
    1.067_140_5,
    1.090_507_7,
    1.114_386_8,
    1.138_788_6,
    1.163_724_9,
    1.189_207_1,
    1.215_247_4,
    1.241_857_8,
    1.269_051,
    1.296_839_6,
    1.325_236_7,
    1.354_255_6,
    1.38391,
    std::f32::consts::SQRT_2,
    1.445_180_8,
    1.476_826_2,
    1.509_164_5,
    1.542_210_8,
    1.575_980_9,
    1.610_490_3,
    1.645_755_5,
    1.681_792_9,
    1.718_619_3,
    1.756_252_2,
    1.794_709_1,
    1.834_008_1,
    1.874_167_7,
    1.915_206_6,
    1.957_144_1,
];

/// The gain code of a token whose components have the mean square `mean_square` = ‖x‖²/d.
///
/// Gains below about 2⁻⁶⁴ become the zero vector.
#[must_use]
pub fn gain_code(mean_square: f32) -> u16 {
    if mean_square <= 0.0 {
        return 0;
    }
    // log2(γ) = log2(mean square) / 2
    let code =
        (f64::from(mean_square).log2() * (0.5 * GAIN_CODES_PER_OCTAVE)).round() as i32 + GAIN_CODE_OF_ONE;
    if code < 1 { 0 } else { code.min(MAX_GAIN_CODE) as u16 }
}

/// The gain that a code stands for, γ̂ = 2^((code − 2048)/32); code 0 is 0.
#[must_use]
#[inline(always)]
pub fn gain(code: u16) -> f32 {
    let code = u32::from(code & 0xfff);
    // The octave goes straight into the exponent: 2048 stands for 2⁰, and codes reach from 2⁻⁶⁴ to 2⁶⁴.
    let octave = (code >> 5).wrapping_sub(64) << 23;
    let gain = f32::from_bits(GAINS_OF_AN_OCTAVE[(code & 31) as usize].to_bits().wrapping_add(octave));
    if code == 0 { 0.0 } else { gain }
}

/// What a block says of its tokens' gains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockGain {
    /// Code of the block's largest gain, in twelve bits.
    pub code: u16,
    /// A fall counts 2^spacing gain codes; four bits.
    pub spacing: u8,
}

impl BlockGain {
    /// For tokens with these gain codes: the least spacing with which the smallest of them, zero vectors aside, can be
    /// stated.
    #[must_use]
    #[inline(always)]
    pub fn of(codes: &[u16]) -> Self {
        let (mut largest, mut smallest) = (0u16, MAX_GAIN_CODE as u16);
        for &code in codes {
            largest = largest.max(code);
            smallest = smallest.min(if code == 0 { MAX_GAIN_CODE as u16 } else { code });
        }
        let range = largest.saturating_sub(smallest);
        let mut spacing = 0;
        while MAX_FALL << spacing < range {
            spacing += 1;
        }
        Self { code: largest, spacing }
    }

    /// How far a token falls below the block's gain, rounded.
    #[must_use]
    #[inline(always)]
    pub fn fall(self, code: u16) -> u8 {
        let below = self.code - code.min(self.code);
        let fall = (below + ((1 << self.spacing) >> 1)) >> self.spacing;
        if code == 0 { FALL_OF_ZERO } else { fall.min(MAX_FALL) as u8 }
    }

    /// The gain γ̂ of a token.
    #[must_use]
    #[inline(always)]
    pub fn gain(self, fall: u8) -> f32 {
        let code = i32::from(self.code) - (i32::from(fall) << self.spacing);
        if fall == FALL_OF_ZERO { 0.0 } else { gain(code.max(1) as u16) }
    }

    /// As stored in front of a block.
    #[must_use]
    #[inline(always)]
    pub fn pack(self) -> u16 {
        self.code | (u16::from(self.spacing) << 12)
    }

    /// What is stored in front of a block.
    #[must_use]
    #[inline(always)]
    pub fn unpack(header: u16) -> Self {
        Self { code: header & 0xfff, spacing: (header >> 12) as u8 }
    }

    /// Gain γ̂ and step factor of a stored side byte.
    #[must_use]
    #[inline(always)]
    pub fn unpack_side(self, side: u8) -> (f32, f32) {
        (self.gain(side & 15), GUARD_SCALES[usize::from(side >> 4)])
    }
}

/// A token's side information as stored: its fall in the low four bits, its guard code in the high four.
#[must_use]
#[inline(always)]
pub const fn pack_side(fall: u8, guard_code: u8) -> u8 {
    fall | (guard_code << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gain_is_within_half_a_step() {
        let bound = (0.5 / GAIN_CODES_PER_OCTAVE).exp2() * (1.0 + 1e-6);
        for exponent in -60..=58 {
            for mantissa in [1.0f64, 1.013, 1.4, 1.77, 1.999] {
                let true_gain = mantissa * f64::from(exponent).exp2();
                let mean_square = (true_gain * true_gain) as f32;
                let ratio = f64::from(gain(gain_code(mean_square))) / f64::from(mean_square).sqrt();
                assert!(ratio < bound && ratio > 1.0 / bound, "gain {true_gain}: ratio {ratio}");
            }
        }
    }

    #[test]
    fn gains_are_powers_of_two_to_the_last_bit() {
        for code in 1..=MAX_GAIN_CODE {
            let exact = (f64::from(code - GAIN_CODE_OF_ONE) / GAIN_CODES_PER_OCTAVE).exp2() as f32;
            assert_eq!(gain(code as u16), exact, "code {code}");
        }
    }

    #[test]
    fn tiny_gains_are_the_zero_vector() {
        assert_eq!(gain(gain_code(0.0)), 0.0);
        assert_eq!(gain(gain_code(1e-40)), 0.0);
    }

    /// Of vectors of any length that the codec takes; an infinite mean square would be taken for the zero vector.
    #[test]
    fn largest_activations_have_a_gain() {
        let square = MAX_MAGNITUDE * MAX_MAGNITUDE;
        let sum = (0..crate::MAX_HEAD_DIM).fold(0.0f32, |sum, _| sum + square);
        assert!(sum.is_finite());
        let ratio = gain(gain_code(sum / crate::MAX_HEAD_DIM as f32)) / MAX_MAGNITUDE;
        assert!((ratio - 1.0).abs() < 0.012, "{ratio}");
    }

    #[test]
    fn tokens_are_within_half_a_spacing() {
        for codes in
            [&[2048u16, 2048, 2047][..], &[2000, 2030, 1970, 0], &[4095, 1, 2048, 700], &[0, 0], &[5]]
        {
            let block = BlockGain::of(codes);
            assert_eq!(BlockGain::unpack(block.pack()), block);
            assert!(block.spacing == 0 || MAX_FALL << (block.spacing - 1) < 4095);
            for &code in codes {
                let (given, scale) = block.unpack_side(pack_side(block.fall(code), 13));
                assert_eq!(scale, GUARD_SCALES[13]);
                if code == 0 {
                    assert_eq!(given, 0.0);
                    continue;
                }
                let off = (f64::from(given) / f64::from(gain(code))).log2().abs() * GAIN_CODES_PER_OCTAVE;
                let half = f64::from(1u32 << block.spacing) / 2.0;
                assert!(off <= half + 1e-4, "{code} in {codes:?}: off by {off} codes, spacing {half}·2");
            }
        }
    }

    #[test]
    fn near_gains_are_as_fine_as_far_ones_are_coarse() {
        assert_eq!(BlockGain::of(&[2048, 2034]).spacing, 0);
        assert_eq!(BlockGain::of(&[2048, 2033]).spacing, 1);
        assert_eq!(BlockGain::of(&[4095, 1]).spacing, 9);
        assert_eq!(BlockGain::of(&[0]), BlockGain { code: 0, spacing: 0 });
    }

    /// Every stored byte means something finite.
    #[test]
    fn any_bytes_are_gains() {
        for head in (0..=u16::MAX).step_by(7) {
            for side in 0..=u8::MAX {
                let (gain, scale) = BlockGain::unpack(head).unpack_side(side);
                assert!(gain.is_finite() && gain >= 0.0 && scale > 0.0);
            }
        }
    }
}
