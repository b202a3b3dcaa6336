//! Calibration: text → moments → basis → widths.
//!
//! A forward and backward pass elsewhere hands over keys, values and gradients window by window; this crate keeps only
//! their second moments ([`StreamMoments`]), designs a transform from them ([`design_stream`]) and spreads a budget of
//! bits over all coefficients of the model ([`allocate`]). Bits are the only knob: the transforms do not depend on
//! them, so one calibration serves every rate.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod allocation;
mod design;
mod error;
mod metric;
mod model_moments;
mod moments;
mod symmetric;

pub use allocation::{Allocation, allocate};
pub use design::{DesignOptions, Metric, design_shared, design_stream};
pub use error::{CalibError, Result};
pub use metric::DEFAULT_SHRINKAGE;
pub use model_moments::{LayerDesign, ModelMoments, ModelShape, Side, Window};
pub use moments::{SharedMoments, StreamMoments, TurnBack};
