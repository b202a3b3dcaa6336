//! What can be wrong with a codec's parameters or with the activations given to it.

use thiserror::Error;

/// Every way in which the codec refuses its input. Nothing is changed when one is returned.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A count or length is outside the range the codec works with.
    #[error("{what} is {given}, expected {expected}")]
    Range {
        /// The quantity, as the user knows it.
        what: &'static str,
        /// The value that was given.
        given: usize,
        /// The values that are allowed.
        expected: &'static str,
    },
    /// An array has another length than the shape it stands for.
    #[error("{what} has {given} elements, expected {expected}")]
    Length {
        /// The array, as the user knows it.
        what: &'static str,
        /// Its length.
        given: usize,
        /// The length that the shape asks for.
        expected: usize,
    },
    /// NaN or infinity in a codec's parameters.
    #[error("{what} holds NaN or infinity; a preset with such values cannot be used, calibrate again")]
    NonFiniteParameter {
        /// The parameter array.
        what: &'static str,
    },
    /// The synthesis matrix cannot be inverted.
    #[error("the basis of this stream is singular, so nothing can be coded with it; calibrate again")]
    SingularBasis,
    /// The columns of a shared low-rank basis are not orthonormal.
    #[error(
        "the columns of U are not orthonormal: max |UᵀU - I| is {deviation:.2e}, at most {limit:.0e} is allowed"
    )]
    NotOrthonormal {
        /// Largest absolute entry of UᵀU - I.
        deviation: f64,
        /// The largest deviation that is accepted.
        limit: f64,
    },
    /// NaN, infinity or a magnitude above [`crate::gain::MAX_MAGNITUDE`] in keys or values.
    #[error(
        "token {token} of KV head {head} holds NaN, infinity or a magnitude above 1e17; the model's {side} are broken before they reach the cache"
    )]
    BadActivation {
        /// "keys" or "values".
        side: &'static str,
        /// KV head.
        head: usize,
        /// Token, counted from the first one handed over.
        token: usize,
    },
    /// The system has no more memory.
    #[error(
        "out of memory: {bytes} bytes for {what} could not be had, and nothing was changed; free memory (crop() or reset() a cache, take shorter prompts or fewer beams) and try again"
    )]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
}

/// The result of a codec operation.
pub type Result<T> = std::result::Result<T, CodecError>;

/// A text that is not the name it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {given:?}, expected {expected}")]
pub struct ParseNameError {
    /// What it was taken for.
    pub what: &'static str,
    /// The text, or its first 80 characters.
    pub given: String,
    /// What is accepted.
    pub expected: &'static str,
}

impl ParseNameError {
    pub(crate) fn new(what: &'static str, given: &str, expected: &'static str) -> Self {
        Self { what, given: given.chars().take(80).collect(), expected }
    }
}

/// Refuses a buffer of another length than its shape asks for.
pub(crate) fn check_len(what: &'static str, given: usize, expected: usize) -> Result<()> {
    if given == expected { Ok(()) } else { Err(CodecError::Length { what, given, expected }) }
}
