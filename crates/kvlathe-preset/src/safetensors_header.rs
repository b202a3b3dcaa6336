//! A look at a safetensors header before the library makes anything of it: how long it is, and whether it has only what
//! belongs there. It holds no more than one name at a time.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::PresetError;
use crate::limited_wire::Bounded;

/// Bytes of the header's length, before the header.
pub(crate) const LENGTH_BYTES: usize = 8;
/// Longest header, in bytes. One of 4096 layers has 6 MB.
const MAX_HEADER_BYTES: u64 = 8 << 20;
/// Most dimensions of a tensor; ours have up to three.
const MAX_DIMS: usize = 8;

/// Refuses a header that could take much memory. What else may be wrong is for the library to say.
pub(crate) fn check(bytes: &[u8]) -> Result<(), PresetError> {
    let Some((len, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else { return Ok(()) };
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER_BYTES {
        let detail = format!("its header has {len} bytes, and at most {MAX_HEADER_BYTES} are read");
        return Err(PresetError::Safetensors { detail });
    }
    match rest.get(..len as usize).map(serde_json::from_slice::<Header>) {
        Some(Err(error)) => Err(PresetError::Safetensors { detail: format!("its header: {error}") }),
        _ => Ok(()),
    }
}

struct Header;

/// What the specification has of a tensor, no more.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only whether they can be read matters")]
struct Tensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Bounded<IgnoredAny, MAX_DIMS>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for Header {
    type Value = Self;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                map.next_value::<Tensor<'de>>()?;
            }
        }
        Ok(self)
    }
}
