//! What a cache refuses. A refused call leaves the cache as it was.

use kvlathe_codec::CodecError;
use thiserror::Error;

/// Every way in which a cache refuses its input.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A tensor's shape does not fit the cache.
    #[error(
        "{what} is {given}, but this cache holds {expected}; use one cache for one batch and call reset() for the next"
    )]
    Shape {
        /// Which dimension.
        what: &'static str,
        /// As given.
        given: usize,
        /// As the cache has it.
        expected: usize,
    },
    /// A buffer is shorter than its shape and strides say.
    #[error("the {what} has {given} elements, its shape needs {expected}")]
    Buffer {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        given: usize,
        /// What its shape needs.
        expected: usize,
    },
    /// More tokens to remove than are held.
    #[error("cannot remove {given} tokens, the cache holds {held}")]
    Crop {
        /// Tokens to remove.
        given: usize,
        /// Tokens held.
        held: usize,
    },
    /// Tokens that have left a sliding window.
    #[error(
        "the token at position {wanted} is no longer held, as it has left the layer's sliding window; the first that is held is {first}"
    )]
    Forgotten {
        /// Position of the first token asked for.
        wanted: usize,
        /// Position of the first token held.
        first: usize,
    },
    /// A batch index that does not exist.
    #[error("batch index {given} does not exist, the cache holds {rows} rows")]
    Row {
        /// The index.
        given: usize,
        /// Rows held.
        rows: usize,
    },
    /// Keys and values of a layer are coded in blocks of different length.
    #[error(
        "keys are coded in blocks of {key} tokens and values in blocks of {value}; calibrate both with one block length"
    )]
    BlockLen {
        /// Keys' block length.
        key: usize,
        /// Values' block length.
        value: usize,
    },
    /// Attention was asked of a layer that cannot give it from its blocks.
    #[error(
        "this layer cannot attend from its blocks: both sides must be coded by the calibrated codec, with a head_dim that eight divides; read() its tokens instead"
    )]
    NotFused,
    /// The system starts no more threads.
    #[error(
        "cannot start {n_threads} threads ({reason}); nothing was done, so raise the process's limits or ask for fewer threads and try again"
    )]
    Threads {
        /// How many were asked for.
        n_threads: usize,
        /// What the system said.
        reason: String,
    },
    /// The codec refused.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// The result of a cache operation.
pub type Result<T> = std::result::Result<T, CacheError>;
