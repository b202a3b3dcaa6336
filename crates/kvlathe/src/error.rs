//! One error for the whole library.

use kvlathe_prefix::PageError;
use thiserror::Error;

/// What any part of kvlathe may refuse.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A preset file.
    #[error(transparent)]
    Preset(#[from] kvlathe_preset::PresetError),
    /// The codec.
    #[error(transparent)]
    Codec(#[from] kvlathe_codec::CodecError),
    /// Calibration.
    #[error(transparent)]
    Calib(#[from] kvlathe_calib::CalibError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] kvlathe_cache::CacheError),
    /// A file of a saved cache.
    #[error(transparent)]
    Container(#[from] kvlathe_prefix::container::ContainerError),
    /// A store of prefixes.
    #[error(transparent)]
    Store(#[from] kvlathe_prefix::StoreError),
    /// A preset of the seed's kind where one with streams is needed.
    #[error(
        "the preset of {model} has no calibrated streams (a seed-style file), so {operation} cannot be done; calibrate one with `kvlathe tune`"
    )]
    SeedPreset {
        /// The preset's model.
        model: String,
        /// What was asked for.
        operation: &'static str,
    },
    /// A cache of a layer that the preset does not code.
    #[error(
        "the preset does not code this layer, so it has no sizes for a cache of it; make one of exact tokens with LayerCache::new and Coding::Exact"
    )]
    NotCoded,
    /// A rate below the side information.
    #[error(
        "{given:.3} bits a value cannot be reached, side information alone takes {least:.3} at this head_dim and block length"
    )]
    Rate {
        /// Asked for.
        given: f64,
        /// Side information a value.
        least: f64,
    },
    /// Cost factors of another number of layers.
    #[error("there are cost factors of {given} layers, the preset has {expected}")]
    FactorCount {
        /// Layers of the factors.
        given: usize,
        /// Layers of the preset.
        expected: usize,
    },
    /// A cost factor that is none.
    #[error("a cost factor of layer {layer} is {given}, expected a finite number above 0")]
    Factor {
        /// Which layer.
        layer: usize,
        /// The factor.
        given: f64,
    },
}

impl From<PageError> for Error {
    fn from(error: PageError) -> Self {
        match error {
            PageError::Cache(inner) => Self::Cache(inner),
            PageError::Container(inner) => Self::Container(inner),
            PageError::Store(inner) => Self::Store(inner),
        }
    }
}

/// The result of an operation of the facade.
pub type Result<T> = std::result::Result<T, Error>;
