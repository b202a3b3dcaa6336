//! Names of things that are coded: keys or values, of which layer, by which preset.

use std::fmt;
use std::str::FromStr;

use crate::error::ParseNameError;

/// Keys or values. Shown as `K` and `V`; [`Side::name`] spells them out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Keys, `K`: rotated by RoPE where the layer has one.
    Key,
    /// Values, `V`: never rotated.
    Value,
}

impl Side {
    /// Both sides, keys first, as in files.
    pub const ALL: [Self; 2] = [Self::Key, Self::Value];

    /// `"key"` or `"value"`, which [`FromStr`] takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Value => "value",
        }
    }

    /// `"keys"` or `"values"`, for sentences.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Key => "keys",
            Self::Value => "values",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "K",
            Self::Value => "V",
        })
    }
}

impl FromStr for Side {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let error = || ParseNameError::new("side", text, "\"key\" or \"value\"");
        Self::ALL.into_iter().find(|side| side.name() == text).ok_or_else(error)
    }
}

/// SHA-256 of all that packed blocks of a preset, and their meaning, depend on. Blocks of equal digests can be exchanged.
///
/// What is hashed is for presets to say. As text: 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The 32 bytes, in the order of the text.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Digest {
    /// A precision gives so many of the first digits: `{:.12}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.pad(&digits)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let error = || ParseNameError::new("digest", text, "64 lower-case hex digits");
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(error()) };
        let bytes = pairs.iter().map(|&[high, low]| Some(nibble(high)? << 4 | nibble(low)?));
        let bytes = bytes.collect::<Option<Vec<u8>>>().ok_or_else(error)?;
        bytes.try_into().map(Self).map_err(|_| error())
    }
}

/// Which codec packed a block: the streams of one side of one layer of one preset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    /// Of the preset.
    pub digest: Digest,
    /// Layer, from 0.
    pub layer: usize,
    /// Keys or values.
    pub side: Side,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { digest, layer, side } = self;
        write!(f, "layer {layer}, {}, preset {digest:.12}", side.plural())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_by_name() {
        for side in Side::ALL {
            assert_eq!(side.name().parse(), Ok(side));
        }
        assert_eq!(Side::ALL.map(|side| side.to_string()), ["K", "V"]);
        assert_eq!(Side::ALL.map(Side::plural), ["keys", "values"]);
        let error = "K".parse::<Side>().unwrap_err();
        assert_eq!(error.to_string(), "side \"K\", expected \"key\" or \"value\"");
    }

    #[test]
    fn digests_as_text() {
        let digest = Digest::from(std::array::from_fn(|i| 0x0a_u8.wrapping_add(i as u8 * 17)));
        let text = digest.to_string();
        assert!(text.starts_with("0a1b2c3d4e5f") && text.len() == 64, "{text}");
        assert_eq!((text.parse(), format!("{digest:?}")), (Ok(digest), text.clone()));
        let broken =
            ["", &text[1..], &text[2..], &format!("{text}00"), &text.to_uppercase(), &"é".repeat(32)];
        for text in broken.map(str::to_owned) {
            let error = text.parse::<Digest>().unwrap_err();
            assert!(error.to_string().ends_with("expected 64 lower-case hex digits"), "{error}");
        }
        assert!("x".repeat(1 << 20).parse::<Digest>().unwrap_err().given.len() == 80);
        let id = StreamId { digest, layer: 3, side: Side::Key };
        assert_eq!(id.to_string(), "layer 3, keys, preset 0a1b2c3d4e5f");
    }
}
