//! The JSON format: the seed's file, with our keys beside its own.

use kvlathe_codec::Side;

use crate::limited_wire::{Bounded, Matrix, Numbers};
use crate::validate::check_n_layers;
use crate::wire::{self, FileWire, LayerWire, SideWire, StreamWire, Streams};
use crate::{LayerPreset, Meta, Preset, PresetError, SharedBasis, SidePreset, StreamPreset};

/// Editors on Windows put a byte order mark in front of UTF-8.
pub(crate) fn skip_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Preset, PresetError> {
    let mut wire = wire::parse(skip_bom(bytes), "the JSON file")?;
    let meta = wire.take_meta()?;
    let layers = wire.layers.ok_or_else(|| PresetError::missing("layers"))?.0;
    check_n_layers(&meta, layers.len())?;
    // Our keys without "kvlathe" are unknown extra keys, and those are ignored.
    let meta_is_seed = meta.lathe.is_none();
    let layers = layers.into_iter().enumerate().map(|(index, layer)| {
        Ok(LayerPreset {
            rope: layer.rope.flatten().filter(|_| !meta_is_seed),
            key: Reader { layer: index, side: Side::Key, meta: &meta }.side(layer.key)?,
            value: Reader { layer: index, side: Side::Value, meta: &meta }.side(layer.value)?,
        })
    });
    let layers = layers.collect::<Result<_, PresetError>>()?;
    let preset = Preset { meta, layers };
    preset.validate()?;
    Ok(preset)
}

/// Text of a preset that is valid and rounded already.
pub(crate) fn to_string(preset: &Preset) -> Result<String, PresetError> {
    let mut wire = FileWire::from_meta(&preset.meta);
    let is_seed = preset.is_seed();
    let layers = preset.layers.iter().map(|layer| LayerWire {
        rope: (!is_seed).then_some(layer.rope),
        key: side_to_wire(&layer.key, preset),
        value: side_to_wire(&layer.value, preset),
    });
    wire.layers = Some(Bounded(layers.collect()));
    let mut text = serde_json::to_string(&wire).map_err(|error| PresetError::json("writing JSON", &error))?;
    text.push('\n');
    Ok(text)
}

fn side_to_wire(side: &SidePreset, preset: &Preset) -> Option<SideWire> {
    let shared = side.shared.as_ref()?;
    let streams = side.streams.iter().map(|stream| StreamWire {
        mean: Some(Numbers(stream.mean.clone())),
        basis: Some(Matrix::new(stream.basis.clone(), stream.mean.len())),
        importance: Some(Numbers(stream.importance.clone())),
        widths: Some(Bounded(stream.widths.clone())),
    });
    Some(SideWire {
        u: Some(Matrix::new(shared.u.clone(), shared.rank)),
        mean: Some(Numbers(shared.mean.clone())),
        streams: (!preset.is_seed()).then(|| Streams(streams.collect())),
    })
}

/// Turns one side from its wire form into the data model. Checks what the data model cannot express, which is
/// the shape of nested lists; the rest is for [`Preset::validate`].
struct Reader<'a> {
    layer: usize,
    side: Side,
    meta: &'a Meta,
}

impl Reader<'_> {
    fn side(&self, wire: Option<SideWire>) -> Result<SidePreset, PresetError> {
        let Some(wire) = wire else { return Ok(SidePreset::default()) };
        let Some(shape) = self.meta.layer_shape(self.layer) else {
            return Err(PresetError::invalid(
                format!("layers[{}].{}", self.layer, self.side),
                "arrays",
                "none: kvlathe.layer_shapes says that this layer is not coded",
            ));
        };
        let d = shape.dim(self.side);
        let u = self.require(wire.u, "U")?;
        let u = self.matrix(u, "U", [d, self.meta.rank])?;
        let mean = self.require(wire.mean, "mean")?.0;
        let shared = Some(SharedBasis { rank: self.meta.rank, u, mean });
        let streams = wire.streams.unwrap_or_default().0;
        let streams = if self.meta.lathe.is_some() { streams } else { Vec::new() };
        let streams = streams.into_iter().enumerate().map(|(head, stream)| self.stream(head, d, stream));
        Ok(SidePreset { shared, streams: streams.collect::<Result<_, _>>()? })
    }

    fn stream(&self, head: usize, d: usize, wire: StreamWire) -> Result<StreamPreset, PresetError> {
        let name = |field: &str| format!("streams[{head}].{field}");
        let basis = self.require(wire.basis, &name("basis"))?;
        Ok(StreamPreset {
            mean: self.require(wire.mean, &name("mean"))?.0,
            basis: self.matrix(basis, &name("basis"), [d, d])?,
            importance: self.require(wire.importance, &name("importance"))?.0,
            widths: self.require(wire.widths, &name("widths"))?.0,
        })
    }

    fn matrix(
        &self,
        matrix: Matrix,
        what: &str,
        [n_rows, n_cols]: [usize; 2],
    ) -> Result<Vec<f32>, PresetError> {
        let given = match matrix.ragged {
            Some((row, len)) => format!("{} in row 0 but {len} in row {row}", matrix.n_cols),
            None if (matrix.n_rows, matrix.n_cols) == (n_rows, n_cols) => return Ok(matrix.data),
            None => format!("[{}, {}]", matrix.n_rows, matrix.n_cols),
        };
        let expected = format!("[{n_rows}, {n_cols}]");
        Err(PresetError::Shape { layer: self.layer, side: self.side, what: what.to_owned(), given, expected })
    }

    fn require<T>(&self, value: Option<T>, key: &str) -> Result<T, PresetError> {
        value.ok_or_else(|| PresetError::missing(format!("layers[{}].{}.{key}", self.layer, self.side)))
    }
}
