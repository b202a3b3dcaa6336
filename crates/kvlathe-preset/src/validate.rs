//! What makes a preset acceptable. Called on everything that is read and on everything that is written.

use kvlathe_codec::{BLOCK_LENS, MAX_HEAD_DIM, Side, WIDTHS, Width};

use crate::{
    FORMAT_VERSION, LatheMeta, LayerPreset, LayerShape, Meta, Preset, PresetError, SharedBasis, SidePreset,
    StreamPreset,
};

/// Largest file that is read or written, 1 GiB. A preset of the largest models has some tens of MB.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// Most layers of a model.
pub const MAX_LAYERS: usize = 4096;
/// Most KV heads of a layer.
pub const MAX_KV_HEADS: usize = 1024;
/// Most KV heads of all layers together: 128 layers of 128. Codecs have tables for each, whatever the head dimension.
pub const MAX_STREAMS: usize = 1 << 14;
/// Most sink tokens.
pub const MAX_SINKS: usize = 4096;
/// How far any entry of UᵀU may be from the identity. Float16 alone accounts for up to 2⁻¹⁰.
pub const ORTHONORMAL_TOLERANCE: f64 = 1e-3;

impl Preset {
    /// Checks everything that can be checked without the model: ranges, shapes, finiteness, orthonormality of
    /// the shared bases. [`Preset::read`] and [`Preset::write`] do it by themselves. Whether stream bases are
    /// invertible is for the codec to say.
    ///
    /// # Errors
    ///
    /// The first thing found wrong: [`PresetError::Invalid`], [`PresetError::UnsupportedVersion`],
    /// [`PresetError::MissingKey`], [`PresetError::Shape`], [`PresetError::NonFinite`] or
    /// [`PresetError::NotOrthonormal`].
    pub fn validate(&self) -> Result<(), PresetError> {
        let meta = &self.meta;
        validate_meta(meta)?;
        check_n_layers(meta, self.layers.len())?;
        for (index, layer) in self.layers.iter().enumerate() {
            check_rope_index(meta, index, layer.rope)?;
            for side in Side::ALL {
                match meta.layer_shape(index) {
                    Some(shape) => SideCheck { layer: index, side, meta, shape }.check(layer.side(side))?,
                    None => check_absent(index, side, layer)?,
                }
            }
        }
        Ok(())
    }
}

/// The part of [`Preset::validate`] that bounds every size.
pub(crate) fn validate_meta(meta: &Meta) -> Result<(), PresetError> {
    in_range("n_layers", meta.n_layers, 1, MAX_LAYERS)?;
    in_range("head_dim", meta.head_dim, 1, MAX_HEAD_DIM)?;
    in_range("rank", meta.rank, 1, meta.head_dim)?;
    if meta.n_heads == 0 {
        return Err(PresetError::invalid("n_heads", 0, "at least 1, the number of query heads"));
    }
    if !(meta.compression_ratio.is_finite() && meta.compression_ratio > 0.0) {
        return Err(PresetError::invalid(
            "compression_ratio",
            meta.compression_ratio,
            "a finite number above 0",
        ));
    }
    meta.lathe.as_ref().map_or(Ok(()), |lathe| validate_lathe(meta, lathe))
}

fn validate_lathe(meta: &Meta, lathe: &LatheMeta) -> Result<(), PresetError> {
    check_version(lathe.format_version)?;
    in_range("kvlathe.n_kv_heads", lathe.n_kv_heads, 1, MAX_KV_HEADS)?;
    match &lathe.layer_shapes {
        None => {
            in_range("n_layers · kvlathe.n_kv_heads", meta.n_layers * lathe.n_kv_heads, 1, MAX_STREAMS)?;
        }
        Some(shapes) => validate_shapes(meta, lathe, shapes)?,
    }
    if !meta.n_heads.is_multiple_of(lathe.n_kv_heads) {
        return Err(PresetError::invalid(
            "kvlathe.n_kv_heads",
            lathe.n_kv_heads,
            format!("a divisor of n_heads = {}, the number of query heads", meta.n_heads),
        ));
    }
    if !BLOCK_LENS.contains(&lathe.block_len) {
        return Err(PresetError::invalid(
            "kvlathe.block_len",
            lathe.block_len,
            format!("one of {BLOCK_LENS:?}"),
        ));
    }
    in_range("kvlathe.n_sinks", lathe.n_sinks, 0, MAX_SINKS)?;
    if !(lathe.bits_per_value.is_finite() && lathe.bits_per_value >= 0.0) {
        return Err(PresetError::invalid(
            "kvlathe.bits_per_value",
            lathe.bits_per_value,
            "a finite number, at least 0",
        ));
    }
    let is_hex = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    for (key, fingerprint) in
        [("kvlathe.fingerprint", &lathe.fingerprint), ("kvlathe.cache_fingerprint", &lathe.cache_fingerprint)]
    {
        if !matches!(fingerprint.len(), 0 | 64) || !fingerprint.bytes().all(is_hex) {
            return Err(PresetError::invalid(
                key,
                // A text may be as long as the file.
                format!("{:?}", fingerprint.chars().take(80).collect::<String>()),
                "64 lower-case hex digits, or \"\" when the model's config is not known",
            ));
        }
    }
    validate_ropes(meta, lathe)
}

fn validate_shapes(meta: &Meta, lathe: &LatheMeta, shapes: &[Option<LayerShape>]) -> Result<(), PresetError> {
    if lathe.format_version < lathe.least_version() {
        let (given, expected) = (lathe.format_version, lathe.least_version());
        let expected = format!("at least {expected}, which kvlathe.layer_shapes came with");
        return Err(PresetError::invalid("kvlathe.format_version", given, expected));
    }
    in_range("number of entries in kvlathe.layer_shapes", shapes.len(), meta.n_layers, meta.n_layers)?;
    for (index, shape) in shapes.iter().enumerate() {
        let Some(shape) = shape else { continue };
        let place = format!("kvlathe.layer_shapes[{index}]");
        in_range(&format!("KV heads of {place}"), shape.n_kv_heads, 1, MAX_KV_HEADS)?;
        for side in Side::ALL {
            in_range(&format!("{side} components of {place}"), shape.dim(side), meta.rank, MAX_HEAD_DIM)?;
        }
    }
    let Some(first) = shapes.iter().flatten().next() else {
        return Err(PresetError::invalid(
            "kvlathe.layer_shapes",
            "null for all layers",
            "a layer that is coded",
        ));
    };
    let total = shapes.iter().flatten().map(|shape| shape.n_kv_heads).sum();
    in_range("KV heads of all layers", total, 1, MAX_STREAMS)?;
    // What readers that look at one layer only find.
    in_range("kvlathe.n_kv_heads", lathe.n_kv_heads, first.n_kv_heads, first.n_kv_heads)?;
    in_range("head_dim", meta.head_dim, first.key_dim, first.key_dim)
}

/// Components of the longest keys.
pub(crate) fn largest_key(lathe: &LatheMeta, head_dim: usize) -> usize {
    let shapes = lathe.layer_shapes.iter().flatten().flatten();
    shapes.map(|shape| shape.key_dim).max().unwrap_or(head_dim)
}

fn check_absent(index: usize, side: Side, layer: &LayerPreset) -> Result<(), PresetError> {
    if layer.rope.is_none() && *layer.side(side) == SidePreset::default() {
        return Ok(());
    }
    Err(PresetError::invalid(
        format!("layers[{index}]"),
        format!("a rotation or arrays of its {side}"),
        "neither: kvlathe.layer_shapes says that this layer is not coded",
    ))
}

fn validate_ropes(meta: &Meta, lathe: &LatheMeta) -> Result<(), PresetError> {
    if lathe.rope.len() > MAX_LAYERS {
        return Err(PresetError::invalid(
            "number of entries in kvlathe.rope",
            lathe.rope.len(),
            format!("at most {MAX_LAYERS}"),
        ));
    }
    for (index, rope) in lathe.rope.iter().enumerate() {
        check_rope(index, largest_key(lathe, meta.head_dim), rope.rotary_dim(), rope.inv_freq())?;
    }
    Ok(())
}

/// Checks the numbers of entry `index` of `kvlathe.rope`.
pub(crate) fn check_rope(
    index: usize,
    head_dim: usize,
    rotary_dim: usize,
    inv_freq: &[f64],
) -> Result<(), PresetError> {
    let place = format!("kvlathe.rope[{index}]");
    if !(2..=head_dim).contains(&rotary_dim) || !rotary_dim.is_multiple_of(2) {
        return Err(PresetError::invalid(
            format!("{place}.rotary_dim"),
            rotary_dim,
            format!("an even number in 2..={head_dim}, the head dimension"),
        ));
    }
    if inv_freq.len() != rotary_dim / 2 {
        return Err(PresetError::invalid(
            format!("number of entries in {place}.inv_freq"),
            inv_freq.len(),
            format!("{}, half of rotary_dim", rotary_dim / 2),
        ));
    }
    if let Some(value) = inv_freq.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
        return Err(PresetError::invalid(format!("{place}.inv_freq"), value, "finite numbers above 0"));
    }
    Ok(())
}

pub(crate) fn check_version(given: u32) -> Result<(), PresetError> {
    match given {
        0 => Err(PresetError::invalid("kvlathe.format_version", 0, "at least 1")),
        1..=FORMAT_VERSION => Ok(()),
        _ => Err(PresetError::UnsupportedVersion { given, supported: FORMAT_VERSION }),
    }
}

pub(crate) fn check_n_layers(meta: &Meta, n_entries: usize) -> Result<(), PresetError> {
    if n_entries != meta.n_layers {
        return Err(PresetError::invalid(
            "n_layers",
            meta.n_layers,
            format!("{n_entries}, the number of layers that the preset has"),
        ));
    }
    Ok(())
}

fn check_rope_index(meta: &Meta, layer: usize, rope: Option<usize>) -> Result<(), PresetError> {
    let n_ropes = meta.lathe.as_ref().map_or(0, |lathe| lathe.rope.len());
    let rotary_dim = |index: usize| meta.lathe.as_ref().map_or(0, |lathe| lathe.rope[index].rotary_dim());
    let key_dim = meta.layer_shape(layer).map_or(usize::MAX, |shape| shape.key_dim);
    match rope {
        Some(index) if index < n_ropes && rotary_dim(index) > key_dim => Err(PresetError::invalid(
            format!("kvlathe.rope[{index}].rotary_dim"),
            rotary_dim(index),
            format!("at most {key_dim}, the components of a key of layer {layer}"),
        )),
        Some(index) if index >= n_ropes => Err(PresetError::invalid(
            format!("layers[{layer}].rope"),
            index,
            format!("null or an index below {n_ropes}, the number of entries in kvlathe.rope"),
        )),
        _ => Ok(()),
    }
}

fn in_range(what: &str, given: usize, low: usize, high: usize) -> Result<(), PresetError> {
    if (low..=high).contains(&given) {
        return Ok(());
    }
    Err(PresetError::invalid(what, given, format!("a number in {low}..={high}")))
}

/// Checks one side of one layer, and knows where it is when it complains.
struct SideCheck<'a> {
    layer: usize,
    side: Side,
    meta: &'a Meta,
    shape: LayerShape,
}

impl SideCheck<'_> {
    fn check(&self, side: &SidePreset) -> Result<(), PresetError> {
        match (&side.shared, &self.meta.lathe) {
            (Some(shared), _) => self.check_shared(shared)?,
            // A kvlathe preset without U would be no seed preset any more.
            (None, Some(_)) => {
                return Err(PresetError::missing(format!("layers[{}].{}.U", self.layer, self.side)));
            }
            (None, None) => {}
        }
        self.check_len("streams", side.streams.len(), &[self.shape.n_kv_heads])?;
        for (head, stream) in side.streams.iter().enumerate() {
            self.check_stream(head, stream)?;
        }
        Ok(())
    }

    fn check_shared(&self, shared: &SharedBasis) -> Result<(), PresetError> {
        let (rank, head_dim) = (self.meta.rank, self.shape.dim(self.side));
        if shared.rank != rank {
            let (given, expected) =
                (format!("[{head_dim}, {}]", shared.rank), format!("[{head_dim}, {rank}]"));
            return Err(self.wrong_shape("U", given, expected));
        }
        self.check_len("U", shared.u.len(), &[head_dim, rank])?;
        self.check_len("mean", shared.mean.len(), &[head_dim])?;
        self.check_finite("U", &shared.u)?;
        self.check_finite("mean", &shared.mean)?;
        let deviation = deviation_from_orthonormal(&shared.u, rank);
        if deviation > ORTHONORMAL_TOLERANCE {
            return Err(PresetError::NotOrthonormal { layer: self.layer, side: self.side, deviation });
        }
        Ok(())
    }

    fn check_stream(&self, head: usize, stream: &StreamPreset) -> Result<(), PresetError> {
        let d = self.shape.dim(self.side);
        let name = |field: &str| format!("streams[{head}].{field}");
        self.check_len(&name("mean"), stream.mean.len(), &[d])?;
        self.check_len(&name("basis"), stream.basis.len(), &[d, d])?;
        self.check_len(&name("importance"), stream.importance.len(), &[d])?;
        self.check_len(&name("widths"), stream.widths.len(), &[d])?;
        self.check_finite(&name("mean"), &stream.mean)?;
        self.check_finite(&name("basis"), &stream.basis)?;
        self.check_finite(&name("importance"), &stream.importance)?;
        let place = format!("layers[{}].{}.streams[{head}]", self.layer, self.side);
        if let Some(value) = stream.importance.iter().find(|value| **value < 0.0) {
            return Err(PresetError::invalid(
                format!("{place}.importance"),
                value,
                "variances, so at least 0",
            ));
        }
        if let Some(width) = stream.widths.iter().find(|&&bits| Width::try_from(bits).is_err()) {
            return Err(PresetError::invalid(
                format!("{place}.widths"),
                width,
                format!("one of {:?} bits", WIDTHS.map(Width::bits)),
            ));
        }
        Ok(())
    }

    fn check_len(&self, what: &str, given: usize, shape: &[usize]) -> Result<(), PresetError> {
        if given == shape.iter().product::<usize>() {
            return Ok(());
        }
        Err(self.wrong_shape(what, format!("[{given}]"), format!("{shape:?}")))
    }

    fn check_finite(&self, what: &str, values: &[f32]) -> Result<(), PresetError> {
        if values.iter().all(|value| value.is_finite()) {
            return Ok(());
        }
        Err(PresetError::NonFinite { layer: self.layer, side: self.side, what: what.to_owned() })
    }

    fn wrong_shape(&self, what: &str, given: String, expected: String) -> PresetError {
        PresetError::Shape { layer: self.layer, side: self.side, what: what.to_owned(), given, expected }
    }
}

/// Largest absolute entry of UᵀU − I, summed in float64; `u` is row-major with `rank` columns, all finite.
fn deviation_from_orthonormal(u: &[f32], rank: usize) -> f64 {
    // Row by row, so that the inner loop runs along memory.
    let mut gram = vec![0.0_f64; rank * rank];
    for row in u.chunks_exact(rank) {
        for (i, &left) in row.iter().enumerate() {
            let left = f64::from(left);
            for (sum, &right) in gram[i * rank + i..(i + 1) * rank].iter_mut().zip(&row[i..]) {
                *sum += left * f64::from(right);
            }
        }
    }
    let mut deviation = 0.0_f64;
    for i in 0..rank {
        for j in i..rank {
            let identity = if i == j { 1.0 } else { 0.0 };
            deviation = deviation.max((gram[i * rank + j] - identity).abs());
        }
    }
    deviation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_the_largest_entry() {
        // Columns (1, 0) and (0.1, 1): UᵀU = [[1, 0.1], [0.1, 1.01]].
        let deviation = deviation_from_orthonormal(&[1.0, 0.1, 0.0, 1.0], 2);
        assert!((deviation - 0.1).abs() < 1e-7, "{deviation}");
        assert_eq!(deviation_from_orthonormal(&[0.0, 1.0, 1.0, 0.0], 2), 0.0);
    }
}
