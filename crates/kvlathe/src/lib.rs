//! kvlathe compresses the key/value cache of transformer language models.
//!
//! It is calibrated once per model: text → moments → basis → preset. A cache built from the preset keeps the first
//! and the latest tokens exact and everything between as packed blocks: preset → cache → blocks → attention.
//!
//! | crate | holds |
//! |---|---|
//! | [`codec`] | streams, basis, gain, quantiser, packed blocks |
//! | [`calib`] | moments, metric, transform, allocation of bits |
//! | [`preset`] | preset files |
//! | [`cache`] | a layer's cache |
//!
//! This crate joins them: [`layer_codings`] makes codecs of a preset, [`preset_from_design`] a preset of a calibration,
//! [`with_bits`] the same preset at another rate, [`with_cost_factors`] one whose importances a measurement has put right.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod assembly;
mod codings;
mod costs;
mod error;

pub use assembly::{preset_from_design, side_bits_per_value, upgraded, with_bits};
pub use codings::{LayerCodings, coding, layer_codings, low_rank};
pub use costs::{expected_costs, with_cost_factors};
pub use error::{Error, Result};
pub use {kvlathe_cache as cache, kvlathe_calib as calib, kvlathe_codec as codec, kvlathe_preset as preset};
