//! What can go wrong between moments and basis.

use kvlathe_codec::CodecError;
use thiserror::Error;

/// Every way in which calibration refuses.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CalibError {
    /// An array has another length than its shape asks for.
    #[error("{what} has {given} elements, expected {expected}")]
    Length {
        /// The array.
        what: &'static str,
        /// Its length.
        given: usize,
        /// The length the shape asks for.
        expected: usize,
    },
    /// An index of a layer or head that does not exist.
    #[error("{what} {given} does not exist, there are {count}")]
    Index {
        /// "layer" or "KV head".
        what: &'static str,
        /// The index.
        given: usize,
        /// How many there are.
        count: usize,
    },
    /// NaN or infinity in activations or gradients.
    #[error("layer {layer}: the {what} hold NaN or infinity; try a wider dtype (float32) for calibration")]
    NonFinite {
        /// Layer.
        layer: usize,
        /// Keys, values, gradients or queries.
        what: &'static str,
    },
    /// Too few tokens for a basis of this size.
    #[error(
        "{given} tokens are too few to calibrate vectors of {head_dim} components, at least {needed} are needed; use more windows or longer text"
    )]
    TooFewTokens {
        /// Tokens seen.
        given: u64,
        /// Components of a vector.
        head_dim: usize,
        /// The least number that is accepted.
        needed: u64,
    },
    /// The eigenvalue iteration did not converge.
    #[error("the eigenproblem of a {what} did not converge; its moments may hold extreme values")]
    Eigen {
        /// Which matrix.
        what: &'static str,
    },
    /// A bit rate that no allocation can reach.
    #[error("a mean of {given} bits a coefficient is out of range, widths allow 0 to 8")]
    Bits {
        /// The rate asked for.
        given: f64,
    },
    /// The codec refused a parameter.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// The result of a calibration step.
pub type Result<T> = std::result::Result<T, CalibError>;
