//! Float16 is part of the format: what a number becomes on disk, and which numbers have no place there.

use half::f16;
use kvlathe_codec::Side;

use crate::{LayerPreset, Preset, PresetError, SharedBasis, SidePreset, StreamPreset};

pub(crate) fn round(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| f16::from_f32(value).to_f32()).collect()
}

impl StreamPreset {
    /// What a reader of the file will see: `mean` and `basis` through float16, to nearest, ties to even. The
    /// relative error of a number is at most 2⁻¹¹, the absolute one 2⁻²⁵ below 2⁻¹⁴. Idempotent.
    #[must_use]
    pub fn rounded(&self) -> Self {
        Self {
            mean: round(&self.mean),
            basis: round(&self.basis),
            importance: self.importance.clone(),
            widths: self.widths.clone(),
        }
    }
}

impl SharedBasis {
    /// As [`StreamPreset::rounded`]: `u` goes through float16, `mean` stays float32.
    #[must_use]
    pub fn rounded(&self) -> Self {
        Self { rank: self.rank, u: round(&self.u), mean: self.mean.clone() }
    }
}

impl SidePreset {
    fn rounded(&self) -> Self {
        Self {
            shared: self.shared.as_ref().map(SharedBasis::rounded),
            streams: self.streams.iter().map(StreamPreset::rounded).collect(),
        }
    }
}

impl Preset {
    /// What a reader of the file will see, in either format: all that is stored as float16 goes through it.
    /// Use it before you measure, so that what you measure is what you ship.
    #[must_use]
    pub fn rounded(&self) -> Self {
        let layers = self.layers.iter().map(|layer| LayerPreset {
            rope: layer.rope,
            key: layer.key.rounded(),
            value: layer.value.rounded(),
        });
        Self { meta: self.meta.clone(), layers: layers.collect() }
    }

    /// Refuses numbers that float16 would turn into infinity, and basis columns that it would wipe out: the
    /// codec inverts the basis as stored, and a zero column has no inverse. Expects a validated preset.
    pub(crate) fn check_float16_range(&self) -> Result<(), PresetError> {
        for (index, layer) in self.layers.iter().enumerate() {
            for side in Side::ALL {
                for (head, stream) in layer.side(side).streams.iter().enumerate() {
                    let place = format!("layers[{index}].{side}.streams[{head}]");
                    check_overflow(&stream.mean, &place, "mean")?;
                    check_overflow(&stream.basis, &place, "basis")?;
                    check_columns(&stream.basis, stream.mean.len(), &place)?;
                }
            }
        }
        Ok(())
    }
}

fn check_overflow(values: &[f32], place: &str, what: &str) -> Result<(), PresetError> {
    match values.iter().find(|&&value| f16::from_f32(value).is_infinite()) {
        Some(value) => Err(PresetError::invalid(
            format!("{place}.{what}"),
            format!("{value:e} somewhere"),
            "at most 65504 in magnitude, the range of float16; was the calibration text long enough?",
        )),
        None => Ok(()),
    }
}

fn check_columns(basis: &[f32], head_dim: usize, place: &str) -> Result<(), PresetError> {
    let survives = |value: f32| f16::from_f32(value).to_f32() != 0.0;
    for column in 0..head_dim {
        if !basis.iter().skip(column).step_by(head_dim).any(|&value| survives(value)) {
            return Err(PresetError::invalid(
                format!("{place}.basis"),
                format!("zero in all of column {column} as float16"),
                "some number above 3e-8 in every column, or the basis cannot be inverted",
            ));
        }
    }
    Ok(())
}
