//! Side information of a token: its gain and its guard, together 16 bits a token and stream.
//!
//! * **Gain.** γ = ‖x‖ / √d, coded in twelve bits on a log scale, 1/32 octave a step. The shape is x divided by the
//!   *decoded* gain, so rounding the gain is no error by itself: it only changes the shape's norm by at most 1.1 %,
//!   and the coefficients absorb that.
//! * **Guard.** A factor on the token's quantiser steps, one of [`GUARD_SCALES`]. A token with an outlying coefficient
//!   takes larger steps instead of clipping.

use std::sync::LazyLock;

/// Activations above this magnitude are refused; real ones stay many orders below.
pub const MAX_MAGNITUDE: f32 = 1e18;

/// Gain codes per octave (doubling of the gain).
const GAIN_CODES_PER_OCTAVE: f64 = 32.0;
/// The code of a gain of one.
const GAIN_CODE_OF_ONE: i32 = 2048;
/// Largest gain code. Code zero stands for the zero vector.
const MAX_GAIN_CODE: i32 = 4095;

/// The factors by which a token's steps may be scaled, by guard code.
///
/// Small ones are close together because the encoder chooses among them for the least error of ordinary tokens; the
/// last ones exist so that no finite activation is ever clipped.
pub const GUARD_SCALES: [f32; 16] =
    [0.75, 0.84, 0.92, 1.0, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6.0, 24.0, 256.0, 16384.0];

/// Gain by code; 16 KiB, shared by all streams.
static GAINS: LazyLock<Vec<f32>> = LazyLock::new(|| {
    (0..=MAX_GAIN_CODE)
        .map(|code| {
            if code == 0 {
                0.0
            } else {
                (f64::from(code - GAIN_CODE_OF_ONE) / GAIN_CODES_PER_OCTAVE).exp2() as f32
            }
        })
        .collect()
});

/// The gain code of a token whose components have the mean square `mean_square` = ‖x‖²/d.
///
/// Gains below 2⁻⁶³ become the zero vector.
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

/// The gain that a code stands for, γ̂.
#[must_use]
pub fn gain(code: u16) -> f32 {
    GAINS[usize::from(code & 0xfff)]
}

/// Side information as stored: gain code in the low twelve bits, guard code in the high four.
#[must_use]
pub const fn pack_side(gain_code: u16, guard_code: u8) -> u16 {
    gain_code | ((guard_code as u16) << 12)
}

/// Gain γ̂ and step factor of a stored side word.
#[must_use]
pub fn unpack_side(side: u16) -> (f32, f32) {
    (gain(side), GUARD_SCALES[usize::from(side >> 12)])
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
    fn tiny_gains_are_the_zero_vector() {
        assert_eq!(gain(gain_code(0.0)), 0.0);
        assert_eq!(gain(gain_code(1e-40)), 0.0);
    }

    #[test]
    fn side_round_trips() {
        let (g, s) = unpack_side(pack_side(2048, 15));
        assert_eq!((g, s), (1.0, GUARD_SCALES[15]));
    }
}
