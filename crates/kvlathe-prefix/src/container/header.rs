//! What a container says of itself: JSON, and what of it is possible.

use kvlathe_codec::{BLOCK_LENS, Digest, Element, MAX_HEAD_DIM, Side};
use kvlathe_preset::{MAX_KV_HEADS, MAX_LAYERS};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{ContainerError, Result};

/// No batch is that large, no sequence that long, no block that big: products of sizes stay numbers.
const MAX_BATCH: usize = 1 << 16;
const MAX_TOKENS: usize = 1 << 40;
const MAX_BLOCK_BYTES: usize = 1 << 24;

/// Number formats of exact tokens, named as torch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE binary32.
    #[serde(rename = "float32")]
    F32,
    /// The upper half of a binary32.
    #[serde(rename = "bfloat16")]
    Bf16,
    /// IEEE binary16.
    #[serde(rename = "float16")]
    F16,
}

impl Dtype {
    /// That of an element.
    ///
    /// # Errors
    /// An element of another kind.
    pub(crate) fn of<E: Element>() -> Result<Self> {
        let named = serde_json::from_value(serde_json::Value::from(E::NAME));
        named.map_err(|_| impossible(format!("exact tokens in {}", E::NAME)))
    }

    /// Of a number.
    #[must_use]
    pub const fn n_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// What a file holds. Unknown keys are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The library that wrote the file.
    #[serde(default)]
    pub library_version: String,
    /// Name of the model, for people.
    #[serde(default)]
    pub model: String,
    /// Digest of the preset that packed the blocks.
    #[serde(serialize_with = "as_text", deserialize_with = "from_text")]
    pub preset: Digest,
    /// Fingerprint of the model's config, `""` where it is unknown.
    #[serde(default)]
    pub fingerprint: String,
    /// Identity of the model's weights, `""` where it is unknown.
    #[serde(default)]
    pub weights: String,
    /// Tokens of each row, forgotten ones among them.
    pub n_tokens: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a block.
    pub block_len: usize,
    /// Whether the tokens' ids are in the file.
    pub has_token_ids: bool,
    /// Position of the first of these ids; 0 but in chunks of a prefix.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first_token_id: usize,
    /// Of a chunk of a prefix: its [key](crate::ChunkKey) as text; else `""`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub chunk_key: String,
    /// Nothing is coded until a sequence is longer than this.
    pub compress_start_len: usize,
    /// So many last tokens stay exact.
    pub uncompressed_tail: usize,
    /// Whether tokens may still be rolled back, so that coding waits for the next ones.
    #[serde(default)]
    pub record_past: bool,
    /// Layers from 0; null for one that holds nothing.
    pub layers: Vec<Option<LayerHeader>>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerHeader {
    /// KV heads.
    pub n_heads: usize,
    /// Of exact tokens as they are held.
    pub dtype: Dtype,
    /// Of keys and of values as the model gives them.
    pub model_dtypes: [Dtype; 2],
    /// First tokens of a sequence that stay exact.
    pub n_sinks: usize,
    /// Tokens that a query sees at most, its own included; null for all.
    pub window: Option<usize>,
    /// Of a left-padded batch: tokens of padding in front of each row, as `docs/block_format.md` lays them out.
    pub padding: Option<Vec<usize>>,
    /// Keys.
    pub key: SideHeader,
    /// Values.
    pub value: SideHeader,
}

/// Keys or values of a layer, in all rows alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideHeader {
    /// Components of a head.
    pub head_dim: usize,
    /// Position of the first token that is held.
    pub first: usize,
    /// Exact tokens from there on.
    pub n_sinks: usize,
    /// Blocks of a row.
    pub n_blocks: usize,
    /// Of a block, all KV heads.
    pub block_bytes: usize,
    /// Exact tokens behind the blocks.
    pub n_tail: usize,
}

impl LayerHeader {
    /// Keys or values.
    #[must_use]
    pub const fn side(&self, side: Side) -> &SideHeader {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    /// Bytes of so many exact tokens of all rows.
    pub(super) fn exact_bytes(&self, side: Side, batch: usize, n_tokens: usize) -> usize {
        batch * self.n_heads * n_tokens * self.side(side).head_dim * self.dtype.n_bytes()
    }
}

impl SideHeader {
    /// Position of the first block's first slot.
    #[must_use]
    pub const fn blocks_at(&self, block_len: usize) -> usize {
        (self.first + self.n_sinks) / block_len * block_len
    }

    /// Position behind the last token.
    fn end(&self, block_len: usize) -> Option<usize> {
        let coded_at = self.first + self.n_sinks;
        let end = match self.n_blocks {
            0 => coded_at,
            n => self.blocks_at(block_len).checked_add(n.checked_mul(block_len)?)?,
        };
        end.checked_add(self.n_tail)
    }
}

impl Header {
    /// Reads JSON and checks it.
    ///
    /// # Errors
    /// Something else than a header, or numbers that are impossible or do not fit each other.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let header: Self = serde_json::from_slice(json).map_err(|error| impossible(error.to_string()))?;
        header.check()?;
        Ok(header)
    }

    /// As in a file.
    ///
    /// # Errors
    /// None with the types as they are.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| impossible(error.to_string()))
    }

    /// That all numbers are possible and fit each other; what is computed of them afterwards cannot overflow.
    pub(super) fn check(&self) -> Result<()> {
        let is_len = BLOCK_LENS.contains(&self.block_len);
        require(is_len, || format!("blocks of {} tokens, expected one of {BLOCK_LENS:?}", self.block_len))?;
        within("rows", self.batch, 1..=MAX_BATCH)?;
        within("tokens", self.n_tokens, 1..=MAX_TOKENS)?;
        within("position of the first token id", self.first_token_id, 0..=self.n_tokens)?;
        within("layers", self.layers.len(), 1..=MAX_LAYERS)?;
        within("compress_start_len", self.compress_start_len, 0..=MAX_TOKENS)?;
        within("uncompressed_tail", self.uncompressed_tail, 0..=MAX_TOKENS)?;
        for (at, layer) in self.layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            within("KV heads", layer.n_heads, 1..=MAX_KV_HEADS)?;
            within("sinks of a layer", layer.n_sinks, 0..=MAX_TOKENS)?;
            within("window", layer.window.unwrap_or(1), 1..=usize::MAX)?;
            if let Some(padding) = &layer.padding {
                let fits = padding.len() == self.batch && padding.iter().all(|&n| n <= self.n_tokens);
                require(fits, || format!("padding of {} rows in a batch of {}", padding.len(), self.batch))?;
            }
            for side in Side::ALL {
                self.check_side(layer.side(side), format_args!("layer {at}, {}s", side.name()))?;
            }
        }
        require(self.n_pieces().is_some() && self.total_bytes().is_some(), || {
            "more bytes than there can be".to_owned()
        })
    }

    fn check_side(&self, side: &SideHeader, what: std::fmt::Arguments<'_>) -> Result<()> {
        within("head_dim", side.head_dim, 1..=MAX_HEAD_DIM)?;
        for (name, given) in [
            ("first position", side.first),
            ("sinks", side.n_sinks),
            ("blocks", side.n_blocks),
            ("tokens of the tail", side.n_tail),
        ] {
            within(name, given, 0..=MAX_TOKENS)?;
        }
        within("bytes of a block", side.block_bytes, usize::from(side.n_blocks > 0)..=MAX_BLOCK_BYTES)?;
        let end = side.end(self.block_len);
        require(end == Some(self.n_tokens), || {
            format!("{what}: sinks, blocks and tail end at {end:?}, expected {}", self.n_tokens)
        })
    }

    fn sides(&self) -> impl Iterator<Item = (&LayerHeader, &SideHeader)> {
        self.layers.iter().flatten().flat_map(|layer| [(layer, &layer.key), (layer, &layer.value)])
    }

    /// Entries of the table; `None` for more than there are numbers.
    pub(super) fn n_pieces(&self) -> Option<usize> {
        self.sides().try_fold(usize::from(self.has_token_ids), |sum, (_, side)| {
            sum.checked_add(2)?.checked_add(self.batch.checked_mul(side.n_blocks)?)
        })
    }

    /// Bytes of all pieces, no alignment counted; `None` for more than there are numbers.
    fn total_bytes(&self) -> Option<usize> {
        let ids = self.batch.checked_mul(self.n_tokens)?.checked_mul(4)?;
        self.sides().try_fold(ids, |sum, (layer, side)| {
            let n_exact = side.n_sinks.checked_add(side.n_tail)?;
            let numbers = [layer.n_heads, n_exact, side.head_dim, layer.dtype.n_bytes()];
            let exact = numbers.into_iter().try_fold(self.batch, usize::checked_mul)?;
            let coded = self.batch.checked_mul(side.n_blocks)?.checked_mul(side.block_bytes)?;
            sum.checked_add(exact)?.checked_add(coded)
        })
    }

    pub(super) fn token_id_bytes(&self) -> usize {
        4 * self.batch * (self.n_tokens - self.first_token_id)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn impossible(what: String) -> ContainerError {
    ContainerError::Header { what }
}

fn require(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(impossible(what())) }
}

fn within(what: &str, given: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
    require(range.contains(&given), || {
        format!("{what}: {given}, expected {} to {}", range.start(), range.end())
    })
}

fn as_text<S: Serializer>(digest: &Digest, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Digest, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}
