//! Calibration → preset, and a preset at another rate.

use kvlathe_calib::{LayerDesign, ModelShape, allocate};
use kvlathe_codec::{Basis, Rope, side_information_bytes};
use kvlathe_preset::{LayerPreset, LayerShape, Meta, Preset, SharedBasis, SidePreset, StreamPreset};

use crate::error::{Error, Result};

/// Puts designed layers into a preset, rounded as its file stores it. Widths are those of the design (none yet).
///
/// `meta.lathe.rope` is filled in from the shape.
///
/// # Errors
/// What [`Preset::validate`] refuses.
pub fn preset_from_design(
    mut meta: Meta,
    shape: &ModelShape,
    designs: Vec<Option<LayerDesign>>,
) -> Result<Preset> {
    let mut ropes: Vec<Rope> = Vec::new();
    let mut layers = Vec::with_capacity(designs.len());
    for (design, shape) in designs.into_iter().zip(&shape.layers) {
        let (Some(design), Some(shape)) = (design, shape) else {
            layers.push(LayerPreset::default());
            continue;
        };
        let rope = shape.rope.as_deref().map(|rope| {
            ropes.iter().position(|known| known == rope).unwrap_or_else(|| {
                ropes.push(rope.clone());
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
        lathe.layer_shapes = layer_shapes(lathe.n_kv_heads, meta.head_dim, shape);
        lathe.format_version = lathe.least_version();
    }
    let preset = Preset { meta, layers }.rounded();
    preset.validate()?;
    Ok(preset)
}

/// The sizes of all layers, where they are not all coded and alike.
fn layer_shapes(n_kv_heads: usize, dim: usize, shape: &ModelShape) -> Option<Vec<Option<LayerShape>>> {
    let uniform = LayerShape { n_kv_heads, key_dim: dim, value_dim: dim };
    let shapes: Vec<_> = shape.layers.iter().map(|layer| layer.as_ref().map(|layer| layer.shape)).collect();
    shapes.iter().any(|shape| *shape != Some(uniform)).then_some(shapes)
}

/// A preset as this version of the format has it. One of version 2 keeps all that it says: its codes are the same, only
/// blocks begin elsewhere. One of version 1 keeps its calibration and its widths; what it says of its rate becomes true of
/// today's blocks, and what was measured with the old ones is dropped. Neither changes the [digest](Preset::digest).
#[must_use]
pub fn upgraded(mut preset: Preset) -> Preset {
    let side_bits = side_bits_per_value(&preset);
    let Some(lathe) = &mut preset.meta.lathe else { return preset };
    if lathe.format_version == 1 {
        let sides = preset.layers.iter().flat_map(|layer| [&layer.key, &layer.value]);
        let (bits, n) = sides
            .flat_map(|side| &side.streams)
            .fold((0.0, 0usize), |(bits, n), stream| (bits + stream.mean_width(), n + 1));
        lathe.measured.clear();
        // A calibration that was never set to a rate has none.
        if lathe.bits_per_value > 0.0 {
            lathe.bits_per_value = bits / n as f64 + side_bits;
        }
    }
    lathe.format_version = lathe.format_version.max(lathe.least_version());
    preset
}

/// Bits a value that gains, guards and drift take, whatever the rate: the mean over all values of a token. 0 for a seed
/// preset.
#[must_use]
pub fn side_bits_per_value(preset: &Preset) -> f64 {
    let Some(lathe) = preset.lathe() else { return 0.0 };
    let sides = preset.layers.iter().flat_map(|layer| [&layer.key, &layer.value]);
    let dims = sides.flat_map(|side| &side.streams).map(|stream| stream.mean.len());
    let (bits, n_values) = dims.fold((0, 0), |(bits, n_values), dim| {
        (bits + 8 * side_information_bytes(dim, lathe.block_len), n_values + dim)
    });
    bits as f64 / (n_values * lathe.block_len) as f64
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
    let side_bits = side_bits_per_value(preset);
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
                stream.widths = widths.by_ref().take(stream.importance.len()).collect();
            }
        }
    }
    let mut meta = lathe.clone();
    meta.format_version = meta.least_version();
    meta.bits_per_value = allocation.mean_bits + side_bits;
    meta.measured.clear();
    preset.meta.lathe = Some(meta);
    Ok(preset)
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
