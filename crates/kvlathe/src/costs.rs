//! What coding a layer is expected to cost, and expectations put right by measurement.
//!
//! Importances come from gradients: they take errors of tokens for independent and small. Errors in keys partly cancel in
//! the softmax, those in values partly add up, and by how much differs from layer to layer. Whoever has measured what
//! a layer's keys or values cost gives the ratio back here, and bits go where they are worth most.

use kvlathe_codec::Width;
use kvlathe_preset::{LayerPreset, Preset, SidePreset};

use crate::error::{Error, Result};

/// Σ λ·D(width) over the coefficients of each layer's keys and of its values: nats a token, where importances are.
///
/// # Errors
/// A seed preset, or a width that no coefficient has.
pub fn expected_costs(preset: &Preset) -> Result<Vec<[f64; 2]>> {
    check(preset, "expected costs")?;
    preset.layers().iter().map(|layer| Ok([cost(&layer.key)?, cost(&layer.value)?])).collect()
}

fn cost(side: &SidePreset) -> Result<f64> {
    let mut sum = 0.0;
    for stream in &side.streams {
        for (&importance, &width) in stream.importance.iter().zip(&stream.widths) {
            sum += f64::from(importance) * Width::try_from(width)?.distortion();
        }
    }
    Ok(sum)
}

/// The same calibration with the importances of each layer's keys and values multiplied by factors, and without a rate:
/// see [`crate::with_bits`]. The calibration's record keeps the factors.
///
/// # Errors
/// A seed preset, factors for another number of layers, or one that is not above 0 and finite, or too large for the
/// importances.
pub fn with_cost_factors(preset: &Preset, factors: &[[f64; 2]]) -> Result<Preset> {
    check(preset, "other importances")?;
    if factors.len() != preset.layers().len() {
        return Err(Error::FactorCount { given: factors.len(), expected: preset.layers().len() });
    }
    let mut preset = preset.clone();
    for (layer, (LayerPreset { key, value, .. }, factors)) in
        preset.layers.iter_mut().zip(factors).enumerate()
    {
        for (side, &factor) in [key, value].into_iter().zip(factors) {
            if !(factor > 0.0 && factor.is_finite()) {
                return Err(Error::Factor { layer, given: factor });
            }
            for stream in &mut side.streams {
                stream.importance.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
                if stream.importance.iter().any(|v| !v.is_finite()) {
                    return Err(Error::Factor { layer, given: factor });
                }
                stream.widths.fill(0);
            }
        }
    }
    if let Some(lathe) = &mut preset.meta.lathe {
        lathe.calibration.insert("cost_factors".into(), serde_json::json!(factors));
        lathe.bits_per_value = 0.0;
        lathe.measured.clear();
    }
    Ok(preset)
}

fn check(preset: &Preset, operation: &'static str) -> Result<()> {
    match preset.lathe() {
        Some(_) => Ok(()),
        None => Err(Error::SeedPreset { model: preset.meta().model.clone(), operation }),
    }
}
