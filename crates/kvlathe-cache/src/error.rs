//! What a cache refuses. A refused call leaves the cache as it was.

use kvlathe_codec::{CodecError, Digest, Side, StreamId};
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
    /// Blocks of a layer whose codec has no name.
    #[error(
        "blocks of this layer have no name that another cache could know them by: its codec was not made from a preset"
    )]
    Unnamed,
    /// An import into a layer that holds tokens.
    #[error(
        "this layer holds {n_tokens} tokens, but blocks are imported into an empty one; call reset() first"
    )]
    NotEmpty {
        /// Tokens held.
        n_tokens: usize,
    },
    /// A block that does not belong where it was given.
    #[error("block {index} of row {row} does not belong there: {mismatch}")]
    WrongBlock {
        /// Of the batch.
        row: usize,
        /// Among the row's blocks.
        index: usize,
        /// What is wrong with it.
        mismatch: BlockMismatch,
    },
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

/// In what a block differs from the one that belongs in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BlockMismatch {
    /// It was packed with another preset, or with the same one at another rate.
    #[error(
        "it was packed with the preset {given:.12}, this layer's is {expected:.12}; use the preset that packed it"
    )]
    Digest {
        /// The block's.
        given: Digest,
        /// The layer's.
        expected: Digest,
    },
    /// It is of another layer.
    #[error("it is of layer {given}, this is layer {expected}")]
    Layer {
        /// The block's.
        given: usize,
        /// This one.
        expected: usize,
    },
    /// It holds keys where values belong, or the other way round.
    #[error("it holds {}, {} belong here", given.plural(), expected.plural())]
    Side {
        /// What it holds.
        given: Side,
        /// What belongs here.
        expected: Side,
    },
    /// It begins elsewhere: blocks out of order, with a gap, or of another sequence.
    #[error(
        "it begins at position {given}, the block that belongs here at {expected}; give a row's blocks in order, without gaps"
    )]
    Position {
        /// Of its first slot.
        given: usize,
        /// Of the first slot that belongs here.
        expected: usize,
    },
    /// It is truncated or too long.
    #[error("it has {given} bytes, blocks of this layer have {expected}")]
    Length {
        /// Its bytes.
        given: usize,
        /// Bytes of a block.
        expected: usize,
    },
}

impl BlockMismatch {
    /// The first difference of a block (its codec's name, first position and number of bytes) from how it should be.
    pub(crate) fn of(given: (StreamId, usize, usize), expected: (StreamId, usize, usize)) -> Option<Self> {
        let ((from, position, n_bytes), (to, right_position, right_n_bytes)) = (given, expected);
        if from.digest != to.digest {
            return Some(Self::Digest { given: from.digest, expected: to.digest });
        }
        if from.layer != to.layer {
            return Some(Self::Layer { given: from.layer, expected: to.layer });
        }
        if from.side != to.side {
            return Some(Self::Side { given: from.side, expected: to.side });
        }
        if position != right_position {
            return Some(Self::Position { given: position, expected: right_position });
        }
        (n_bytes != right_n_bytes).then_some(Self::Length { given: n_bytes, expected: right_n_bytes })
    }
}
