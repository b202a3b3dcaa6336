//! Calibration: what a text tells of a model's keys and values, and the transform that is made from it.
//!
//! ```text
//! text ──▶ keys, values, gradients ──▶ moments ──▶ basis and importances ──▶ widths
//!          (whoever runs the model)    add          design                    allocate
//! ```
//!
//! Somebody else runs the model, forwards and backwards, and hands over keys, values and gradients, a window of text at a
//! time. Of these, [`ModelMoments`] keeps second moments only, whose size does not depend on how much text there was.
//!
//! From the moments of each stream [`design_stream`] makes a [`Basis`](kvlathe_codec::Basis): a generalised Karhunen-Loève
//! transform, whose coefficients are uncorrelated, and for each what the model loses with it. What an error costs is the
//! [`Metric`]: by Fisher's, from gradients, in nats a token; without gradients, from queries or the output projection.
//!
//! [`allocate`] then lets all coefficients of the model compete for one budget of bits. Bits are the only knob, and no
//! transform depends on them: one calibration serves every rate.
//!
//! ```
//! use kvlathe_calib::{DesignOptions, Metric, StreamMoments, allocate, design_stream};
//!
//! // Values of four components that mostly rise and fall together.
//! let mut random = fastrand::Rng::with_seed(7);
//! let mut moments = StreamMoments::new(4);
//! for _ in 0..1000 {
//!     let common = random.f32() - 0.5;
//!     let token = [(); 4].map(|()| common + 0.1 * (random.f32() - 0.5));
//!     moments.add(&token, None, None)?;
//! }
//!
//! // An error costs the same whatever its direction. The first coefficient is what they share: it gets most bits.
//! let identity = (0..16).map(|i| f64::from(u8::from(i % 5 == 0))).collect();
//! let mut basis = design_stream(&moments, None, &Metric::Given(identity), &DesignOptions::default())?;
//! assert!(basis.importance[0] > 10.0 * basis.importance[1]);
//! basis.widths = allocate(&basis.importance, 2.0)?.widths;
//! assert!(basis.widths[0] > basis.widths[3]);
//! # Ok::<(), kvlathe_calib::CalibError>(())
//! ```
//!
//! This is the only crate with an eigensolver, which is slow to compile. The seed's transform, one basis for all heads
//! ([`design_shared`]), is made here, too: a preset holds both.

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
pub use kvlathe_codec::Side;
pub use metric::DEFAULT_SHRINKAGE;
pub use model_moments::{CalibratedLayer, LayerDesign, ModelMoments, ModelShape, Window};
pub use moments::{SharedMoments, StreamMoments, TurnBack};
