//! Widths: the number of bits that one coefficient is stored with.

use crate::error::CodecError;

/// Bits of one coefficient. Zero means that the coefficient is not stored and decodes to its block's drift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Width {
    /// Not stored.
    W0 = 0,
    /// Two levels.
    W1 = 1,
    /// Four levels.
    W2 = 2,
    /// Eight levels.
    W3 = 3,
    /// Sixteen levels.
    W4 = 4,
    /// 256 levels.
    W8 = 8,
}

/// All widths, narrow to wide.
pub const WIDTHS: [Width; 6] = [Width::W0, Width::W1, Width::W2, Width::W3, Width::W4, Width::W8];

impl Width {
    /// Number of bits.
    #[must_use]
    pub const fn bits(self) -> usize {
        self as usize
    }

    /// Half the number of levels: codes run from 0 to `2 * half_levels - 1`.
    #[must_use]
    pub const fn half_levels(self) -> usize {
        if matches!(self, Self::W0) { 0 } else { 1 << (self as usize - 1) }
    }

    /// What is added to a code to make it a level: ½ − 2^width/2.
    #[must_use]
    pub const fn level_offset(self) -> f32 {
        0.5 - self.half_levels() as f32
    }

    /// Step of the uniform mid-rise quantiser that has the least squared error for a unit Gaussian
    /// (Max, "Quantizing for minimum distortion", 1960; table II). The step of a coefficient is this times its
    /// standard deviation. A coefficient that is not stored is counted in standard deviations.
    #[must_use]
    pub const fn step(self) -> f32 {
        match self {
            Self::W0 => 1.0,
            Self::W1 => 1.596,
            Self::W2 => 0.995_7,
            Self::W3 => 0.586,
            Self::W4 => 0.335_2,
            Self::W8 => 0.030_8,
        }
    }

    /// Squared error of that quantiser for a unit Gaussian, D(b) of the allocation.
    #[must_use]
    pub const fn distortion(self) -> f64 {
        match self {
            Self::W0 => 1.0,
            Self::W1 => 0.363_4,
            Self::W2 => 0.118_8,
            Self::W3 => 0.037_44,
            Self::W4 => 0.011_54,
            Self::W8 => 0.000_101,
        }
    }
}

impl TryFrom<u8> for Width {
    type Error = CodecError;

    fn try_from(bits: u8) -> Result<Self, CodecError> {
        match bits {
            0 => Ok(Self::W0),
            1 => Ok(Self::W1),
            2 => Ok(Self::W2),
            3 => Ok(Self::W3),
            4 => Ok(Self::W4),
            8 => Ok(Self::W8),
            other => Err(CodecError::Range {
                what: "a coefficient's width",
                given: other.into(),
                expected: "0, 1, 2, 3, 4 or 8 bits",
            }),
        }
    }
}
