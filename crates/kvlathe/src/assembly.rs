//! Calibration → preset, and a preset at another rate.

use kvlathe_calib::{LayerDesign, ModelShape, allocate};
use kvlathe_codec::{Basis, Pairing, Rope, side_information_bytes};
use kvlathe_preset::{
    FORMAT_VERSION, LayerPreset, Meta, Preset, RopeDescription, SharedBasis, SidePreset, StreamPreset,
};

use crate::error::{Error, Result};

/// Puts designed layers into a preset, rounded as its file stores it. Widths are those of the design (none yet).
///
/// `meta.lathe.rope` is filled in from the shape.
///
/// # Errors
/// What [`Preset::validate`] refuses.
pub fn preset_from_design(mut meta: Meta, shape: &ModelShape, designs: Vec<LayerDesign>) -> Result<Preset> {
    let mut ropes: Vec<RopeDescription> = Vec::new();
    let mut layers = Vec::with_capacity(designs.len());
    for (design, rope) in designs.into_iter().zip(&shape.ropes) {
        let rope = rope.as_deref().map(|rope| {
            let described = describe(rope);
            ropes.iter().position(|known| *known == described).unwrap_or_else(|| {
                ropes.push(described);
                ropes.len() - 1
            })
        });
        layers.push(LayerPreset {
            rope,
            key: side(design.key, design.key_shared),
            value: side(design.value, design.value_shared),
        });
    }
    if let Some(lathe) = &mut meta.lathe {
        lathe.rope = ropes;
    }
    let preset = Preset { meta, layers }.rounded();
    preset.validate()?;
    Ok(preset)
}

/// A preset as this version of the format has it. One of version 1 keeps its calibration and its widths; what it says of
/// its rate becomes true of today's blocks, and what was measured with the old ones is dropped.
#[must_use]
pub fn upgraded(mut preset: Preset) -> Preset {
    if preset.lathe().is_none_or(|lathe| lathe.format_version >= FORMAT_VERSION) {
        return preset;
    }
    let head_dim = preset.meta.head_dim;
    let streams =
        preset.layers.iter().flat_map(|layer| [&layer.key, &layer.value]).flat_map(|side| &side.streams);
    let (bits, n) = streams.fold((0.0, 0usize), |(bits, n), stream| (bits + stream.mean_width(), n + 1));
    if let Some(lathe) = &mut preset.meta.lathe {
        lathe.format_version = FORMAT_VERSION;
        lathe.measured.clear();
        // A calibration that was never set to a rate has none.
        if lathe.bits_per_value > 0.0 {
            lathe.bits_per_value = bits / n as f64 + side_bits_per_value(head_dim, lathe.block_len);
        }
    }
    preset
}

/// Bits a value that gains, guards and drift take, whatever the rate.
#[must_use]
pub fn side_bits_per_value(head_dim: usize, block_len: usize) -> f64 {
    (8 * side_information_bytes(head_dim, block_len)) as f64 / (head_dim * block_len) as f64
}

/// The same preset at another rate: the mean over all coefficients of the model, side information included, is at
/// most `bits_per_value`. The transforms stay; only widths change, and what was measured at the old rate is dropped.
///
/// # Errors
/// A seed preset, a rate below the side information or above 8 bits a coefficient.
pub fn with_bits(preset: &Preset, bits_per_value: f64) -> Result<Preset> {
    let Some(lathe) = preset.lathe() else {
        return Err(Error::SeedPreset { model: preset.meta().model.clone(), operation: "another rate" });
    };
    let head_dim = preset.meta().head_dim;
    let side_bits = side_bits_per_value(head_dim, lathe.block_len);
    if bits_per_value.is_nan() || bits_per_value < side_bits {
        return Err(Error::Rate { given: bits_per_value, least: side_bits });
    }
    let streams = |preset: &Preset| -> Vec<f32> {
        let sides = preset.layers.iter().flat_map(|layer| [&layer.key, &layer.value]);
        sides.flat_map(|side| &side.streams).flat_map(|stream| stream.importance.clone()).collect()
    };
    let allocation = allocate(&streams(preset), bits_per_value - side_bits)?;
    let mut preset = preset.clone();
    let mut widths = allocation.widths.iter().map(|width| width.bits() as u8);
    for layer in &mut preset.layers {
        for side in [&mut layer.key, &mut layer.value] {
            for stream in &mut side.streams {
                stream.widths = widths.by_ref().take(head_dim).collect();
            }
        }
    }
    let mut meta = lathe.clone();
    meta.format_version = FORMAT_VERSION;
    meta.bits_per_value = allocation.mean_bits + side_bits;
    meta.measured.clear();
    preset.meta.lathe = Some(meta);
    Ok(preset)
}

fn describe(rope: &Rope) -> RopeDescription {
    let pairing = match rope.pairing() {
        Pairing::HalfSplit => kvlathe_preset::Pairing::HalfSplit,
        Pairing::Interleaved => kvlathe_preset::Pairing::Interleaved,
    };
    RopeDescription { pairing, rotary_dim: rope.rotary_dim(), inv_freq: rope.inv_freq().to_vec() }
}

fn side(bases: Vec<Basis>, (u, mean): (Vec<f32>, Vec<f32>)) -> SidePreset {
    let rank = u.len() / mean.len();
    let streams = bases
        .into_iter()
        .map(|basis| StreamPreset {
            mean: basis.mean,
            basis: basis.synthesis,
            importance: basis.importance,
            widths: basis.widths.iter().map(|width| width.bits() as u8).collect(),
        })
        .collect();
    SidePreset { shared: Some(SharedBasis { rank, u, mean }), streams }
}
