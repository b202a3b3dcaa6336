//! The safetensors format: the metadata as JSON in the header, one tensor per kind of number, layer and side.

use std::collections::HashMap;

use half::f16;
use kvlathe_codec::Side;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorView, serialize};

use crate::limited_wire::Bounded;
use crate::safetensors_header as header;
use crate::validate::check_n_layers;
use crate::wire::{self, FileWire};
use crate::{LayerPreset, Meta, Preset, PresetError, SharedBasis, SidePreset, StreamPreset};

/// Key of our JSON in the header's string map.
const METADATA_KEY: &str = "kvlathe";

fn container_error(error: &safetensors::SafeTensorError) -> PresetError {
    PresetError::Safetensors { detail: error.to_string() }
}

/// First part of the names of a side's tensors.
fn prefix(layer: usize, side: Side) -> String {
    format!("layers.{layer}.{}", side.name())
}

/// A header, and the data that its offsets refer to.
struct Container<'a> {
    header: Metadata,
    data: &'a [u8],
}

impl<'a> Container<'a> {
    /// The library checks that the tensors follow one another without gaps from the header to the end of the file, each
    /// as long as its type and shape say. It takes some fifty times the memory of a header on the way, so a header is
    /// looked through before, which takes none.
    fn read(bytes: &'a [u8]) -> Result<Self, PresetError> {
        header::check(bytes)?;
        let (len, header) = SafeTensors::read_metadata(bytes).map_err(|error| container_error(&error))?;
        Ok(Self { header, data: &bytes[header::LENGTH_BYTES + len..] })
    }
}

pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Preset, PresetError> {
    let container = Container::read(bytes)?;
    let text = container.header.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
    let text = text.ok_or_else(|| PresetError::NotAPreset {
        found: format!(
            "it is a safetensors file without `{METADATA_KEY}` in its metadata, perhaps a model's weights"
        ),
    })?;
    let mut wire = wire::parse(text.as_bytes(), "the metadata of the safetensors file")?;
    let meta = wire.take_meta()?;
    let ropes = wire.layer_rope.ok_or_else(|| PresetError::missing("layer_rope"))?.0;
    check_n_layers(&meta, ropes.len())?;
    check_layer_names(&meta, &container.header)?;
    let layers = ropes.into_iter().enumerate().map(|(layer, rope)| {
        Ok(LayerPreset {
            rope,
            key: Reader { layer, side: Side::Key, meta: &meta, container: &container }.side()?,
            value: Reader { layer, side: Side::Value, meta: &meta, container: &container }.side()?,
        })
    });
    let layers = layers.collect::<Result<_, PresetError>>()?;
    let preset = Preset { meta, layers };
    preset.validate()?;
    Ok(preset)
}

/// Tensors of layers that the metadata does not count mean that one of the two is wrong.
fn check_layer_names(meta: &Meta, header: &Metadata) -> Result<(), PresetError> {
    let index = |name: &str| name.strip_prefix("layers.")?.split('.').next()?.parse::<usize>().ok();
    match header.tensors().keys().filter_map(|name| index(name)).max() {
        Some(last) if last >= meta.n_layers => check_n_layers(meta, last.saturating_add(1)),
        _ => Ok(()),
    }
}

/// Reads the tensors of one side of one layer.
struct Reader<'a> {
    layer: usize,
    side: Side,
    meta: &'a Meta,
    container: &'a Container<'a>,
}

impl Reader<'_> {
    fn side(&self) -> Result<SidePreset, PresetError> {
        match self.meta.layer_shape(self.layer) {
            None => Ok(SidePreset::default()),
            Some(shape) => {
                let d = shape.dim(self.side);
                Ok(SidePreset { shared: self.shared(d)?, streams: self.streams(shape.n_kv_heads, d)? })
            }
        }
    }

    fn shared(&self, d: usize) -> Result<Option<SharedBasis>, PresetError> {
        let rank = self.meta.rank;
        let is_there = |field: &str| self.container.header.info(&self.name(field)).is_some();
        if self.meta.lathe.is_none() && !is_there("shared.u") && !is_there("shared.mean") {
            return Ok(None);
        }
        let u = floats16(self.bytes("shared.u", Dtype::F16, &[d, rank])?);
        let mean = floats32(self.bytes("shared.mean", Dtype::F32, &[d])?);
        Ok(Some(SharedBasis { rank, u, mean }))
    }

    fn streams(&self, h: usize, d: usize) -> Result<Vec<StreamPreset>, PresetError> {
        if self.meta.lathe.is_none() {
            return Ok(Vec::new());
        }
        let means = self.bytes("mean", Dtype::F16, &[h, d])?;
        let bases = self.bytes("basis", Dtype::F16, &[h, d, d])?;
        let importances = self.bytes("importance", Dtype::F32, &[h, d])?;
        let widths = self.bytes("widths", Dtype::U8, &[h, d])?;
        // All four were checked against h and d above, so the chunks are whole and equally many.
        let chunks = means.chunks_exact(2 * d).zip(bases.chunks_exact(2 * d * d));
        let chunks = chunks.zip(importances.chunks_exact(4 * d).zip(widths.chunks_exact(d)));
        let streams = chunks.map(|((mean, basis), (importance, widths))| StreamPreset {
            mean: floats16(mean),
            basis: floats16(basis),
            importance: floats32(importance),
            widths: widths.to_vec(),
        });
        Ok(streams.collect())
    }

    /// The bytes of a tensor, whose type and shape are as demanded; the container has checked that they are
    /// all there.
    fn bytes(&self, field: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], PresetError> {
        let name = self.name(field);
        let tensor = self.container.header.info(&name).ok_or_else(|| PresetError::missing(name.clone()))?;
        if tensor.dtype != dtype {
            return Err(PresetError::invalid(format!("type of {name}"), tensor.dtype, dtype.to_string()));
        }
        if tensor.shape != shape {
            return Err(PresetError::Shape {
                layer: self.layer,
                side: self.side,
                what: field.to_owned(),
                given: format!("{:?}", tensor.shape),
                expected: format!("{shape:?}"),
            });
        }
        let (start, end) = tensor.data_offsets;
        Ok(&self.container.data[start..end])
    }

    fn name(&self, field: &str) -> String {
        format!("{}.{field}", prefix(self.layer, self.side))
    }
}

fn floats16(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&number| f16::from_le_bytes(number).to_f32()).collect()
}

fn floats32(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number)).collect()
}

/// A tensor to be written.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Bytes of a preset that is valid and rounded already.
pub(crate) fn to_bytes(preset: &Preset) -> Result<Vec<u8>, PresetError> {
    let mut wire = FileWire::from_meta(&preset.meta);
    wire.layer_rope = Some(Bounded(preset.layers.iter().map(|layer| layer.rope).collect()));
    let text = serde_json::to_string(&wire).map_err(|error| PresetError::json("writing JSON", &error))?;
    let mut tensors = Vec::new();
    for (index, layer) in preset.layers.iter().enumerate() {
        for side in Side::ALL {
            push_side(&mut tensors, &prefix(index, side), layer.side(side));
        }
    }
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?;
        Ok((tensor.name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|error| container_error(&error))?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), text)]);
    let bytes = serialize(views, Some(metadata)).map_err(|error| container_error(&error))?;
    header::check(&bytes)?;
    Ok(bytes)
}

fn push_side(tensors: &mut Vec<Tensor>, prefix: &str, side: &SidePreset) {
    let mut push = |field: &str, dtype, shape: &[usize], bytes| {
        tensors.push(Tensor { name: format!("{prefix}.{field}"), dtype, shape: shape.to_vec(), bytes });
    };
    if let Some(shared) = &side.shared {
        let d = shared.mean.len();
        push("shared.u", Dtype::F16, &[d, shared.rank], bytes16(&shared.u).collect());
        push("shared.mean", Dtype::F32, &[d], bytes32(&shared.mean).collect());
    }
    let streams = &side.streams;
    let h = streams.len();
    if h > 0 {
        let d = streams[0].mean.len();
        push("mean", Dtype::F16, &[h, d], streams.iter().flat_map(|stream| bytes16(&stream.mean)).collect());
        push(
            "basis",
            Dtype::F16,
            &[h, d, d],
            streams.iter().flat_map(|stream| bytes16(&stream.basis)).collect(),
        );
        let importance = streams.iter().flat_map(|stream| bytes32(&stream.importance));
        push("importance", Dtype::F32, &[h, d], importance.collect());
        push(
            "widths",
            Dtype::U8,
            &[h, d],
            streams.iter().flat_map(|stream| stream.widths.iter().copied()).collect(),
        );
    }
}

fn bytes16(values: &[f32]) -> impl Iterator<Item = u8> {
    values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes())
}

fn bytes32(values: &[f32]) -> impl Iterator<Item = u8> {
    values.iter().flat_map(|value| value.to_le_bytes())
}
