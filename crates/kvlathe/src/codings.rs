//! Preset → codecs: what a cache of each layer is built from.

use std::sync::Arc;

use kvlathe_cache::{Coding, LayerCache, Policy};
use kvlathe_codec::{Basis, Digest, Element, LayerShape, LowRank, Side, Storage, StreamId, StreamSet, Width};
use kvlathe_preset::{LatheMeta, Preset, SharedBasis, StreamPreset};

use crate::error::{Error, Result};

/// How one layer's keys and values are stored.
#[derive(Debug, Clone)]
pub struct LayerCodings {
    /// Keys.
    pub key: Coding,
    /// Values.
    pub value: Coding,
    /// The layer's sizes; `None` where the preset does not code it.
    pub shape: Option<LayerShape>,
}

impl LayerCodings {
    /// An empty cache of this layer for `batch` sequences. [`default_policy`] is a good one.
    ///
    /// # Errors
    /// A layer that the preset does not code, no sequence, codings that do not fit each other.
    pub fn cache<E: Element>(&self, policy: Policy, batch: usize) -> Result<LayerCache<E>> {
        let LayerShape { n_kv_heads, key_dim, value_dim } = self.shape.ok_or(Error::NotCoded)?;
        let (key, value) = (self.key.clone(), self.value.clone());
        Ok(LayerCache::new(key, value, policy, batch, n_kv_heads, (key_dim, value_dim))?)
    }
}

/// Tokens that stay exact at the end of a sequence; `docs/quality.md` has what fewer or more of them cost.
const RECENT_TOKENS: usize = 128;

/// What stays exact unless somebody knows better: the sinks that a preset was calibrated with, and the last 128 tokens.
#[must_use]
pub fn default_policy(preset: &Preset) -> Policy {
    let n_sinks = preset.lathe().map_or(0, |lathe| lathe.n_sinks);
    Policy { n_sinks, n_tail: RECENT_TOKENS, ..Policy::default() }
}

/// The codings of every layer, by the names that blocks are exported under.
///
/// # Errors
/// As [`stream_set`].
pub fn layer_codings(preset: &Preset) -> Result<Vec<LayerCodings>> {
    let digest = digest(preset)?;
    let blocks = |layer, side| {
        Ok::<_, Error>(Coding::Blocks(Arc::new(stream_set(preset, StreamId { digest, layer, side })?)))
    };
    (0..preset.layers().len())
        .map(|layer| {
            let shape = preset.meta().layer_shape(layer);
            let (key, value) = match shape {
                Some(_) => (blocks(layer, Side::Key)?, blocks(layer, Side::Value)?),
                None => (Coding::Exact, Coding::Exact),
            };
            Ok(LayerCodings { key, value, shape })
        })
        .collect()
}

fn digest(preset: &Preset) -> Result<Digest> {
    preset.digest().ok_or_else(|| seed_preset(preset))
}

fn lathe(preset: &Preset) -> Result<&LatheMeta> {
    preset.lathe().ok_or_else(|| seed_preset(preset))
}

fn seed_preset(preset: &Preset) -> Error {
    Error::SeedPreset { model: preset.meta().model.clone(), operation: "packing blocks" }
}

/// The codec of one side of one layer.
///
/// # Errors
/// A seed preset: what it has is [`low_rank`]'s. What the codec refuses of the preset's arrays.
pub fn stream_set(preset: &Preset, id: StreamId) -> Result<StreamSet> {
    let lathe = lathe(preset)?;
    let rope = match id.side {
        Side::Key => preset.rope(id.layer).cloned().map(Arc::new),
        Side::Value => None,
    };
    let streams = &preset.layers()[id.layer].side(id.side).streams;
    let bases = streams.iter().map(basis).collect::<Result<Vec<_>>>()?;
    Ok(StreamSet::new(&bases, rope, lathe.block_len)?.with_id(id))
}

/// The seed's coder of a shared basis.
///
/// # Errors
/// What the codec refuses of the arrays.
pub fn low_rank(shared: &SharedBasis, storage: Storage) -> Result<LowRank> {
    Ok(LowRank::new(&shared.u, &shared.mean, shared.rank, storage)?)
}

fn basis(stream: &StreamPreset) -> Result<Basis> {
    let widths =
        stream.widths.iter().map(|&bits| Width::try_from(bits)).collect::<std::result::Result<_, _>>()?;
    Ok(Basis {
        mean: stream.mean.clone(),
        synthesis: stream.basis.clone(),
        importance: stream.importance.clone(),
        widths,
    })
}
