//! Preset → codecs: what a cache of each layer is built from.

use std::sync::Arc;

use kvlathe_cache::Coding;
use kvlathe_codec::{Basis, LowRank, Pairing, Rope, Storage, StreamSet, Width};
use kvlathe_preset::{Preset, RopeDescription, SharedBasis, Side, StreamPreset};

use crate::error::Result;

/// How one layer's keys and values are stored.
#[derive(Debug, Clone)]
pub struct LayerCodings {
    /// Keys.
    pub key: Coding,
    /// Values.
    pub value: Coding,
}

/// The codings of every layer. Seed presets compress values only (keys stay exact), as the seed does.
///
/// # Errors
/// What the codec refuses of the preset's arrays.
pub fn layer_codings(preset: &Preset) -> Result<Vec<LayerCodings>> {
    (0..preset.layers().len())
        .map(|layer| {
            Ok(LayerCodings {
                key: coding(preset, layer, Side::Key)?,
                value: coding(preset, layer, Side::Value)?,
            })
        })
        .collect()
}

/// The coding of one side of one layer.
///
/// # Errors
/// What the codec refuses of the preset's arrays.
pub fn coding(preset: &Preset, layer: usize, side: Side) -> Result<Coding> {
    let streams = &preset.layers()[layer].side(side).streams;
    if let (Some(lathe), false) = (preset.lathe(), streams.is_empty()) {
        let rope = match side {
            Side::Key => preset.rope(layer).map(rope).transpose()?.map(Arc::new),
            Side::Value => None,
        };
        let bases = streams.iter().map(basis).collect::<Result<Vec<_>>>()?;
        return Ok(Coding::Blocks(Arc::new(StreamSet::new(&bases, rope, lathe.block_len)?)));
    }
    match (side, preset.shared(layer, side)) {
        (Side::Value, Some(shared)) => Ok(Coding::LowRank(Arc::new(low_rank(shared, Storage::Int8)?))),
        _ => Ok(Coding::Exact),
    }
}

/// The seed's coder of a shared basis.
///
/// # Errors
/// What the codec refuses of the arrays.
pub fn low_rank(shared: &SharedBasis, storage: Storage) -> Result<LowRank> {
    Ok(LowRank::new(&shared.u, &shared.mean, shared.rank, storage)?)
}

fn rope(description: &RopeDescription) -> Result<Rope> {
    let pairing = match description.pairing {
        kvlathe_preset::Pairing::HalfSplit => Pairing::HalfSplit,
        kvlathe_preset::Pairing::Interleaved => Pairing::Interleaved,
    };
    Ok(Rope::new(pairing, description.rotary_dim, description.inv_freq.clone())?)
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
