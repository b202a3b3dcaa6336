//! Pieces of coding and reading that threads take one after another.

use std::ops::Range;
use std::sync::Arc;

use kvlathe_codec::{Element, LowRank, StreamSet, best_isa, memory};

use crate::block::Block;
use crate::error::Result;
use crate::exact::ExactRun;
use crate::workspace::with_workspace;

/// Tokens to be coded.
pub(crate) enum EncodePiece<'a, E> {
    /// A block of all heads, `tokens` from `first` on, which begin at `position`.
    Block {
        set: &'a StreamSet,
        tokens: &'a ExactRun<E>,
        first: usize,
        position: usize,
        block: &'a mut Option<Arc<Block>>,
    },
    /// One head's vectors.
    Vectors { coder: &'a LowRank, vectors: &'a [E], coded: &'a mut [u8] },
}

impl<E: Element> EncodePiece<'_, E> {
    pub(crate) fn encode(self) -> Result<()> {
        match self {
            Self::Block { set, tokens, first, position, block } => {
                let encode =
                    |scratch: &mut _| Block::encode(set, tokens, first, position, best_isa(), scratch);
                *block = Some(with_workspace(|workspace| encode(&mut workspace.scratch))?);
            }
            Self::Vectors { coder, vectors, coded } => {
                let vectors = vectors.chunks_exact(coder.head_dim());
                for (x, out) in vectors.zip(coded.chunks_exact_mut(coder.vector_bytes())) {
                    coder.encode(x, out);
                }
            }
        }
        Ok(())
    }
}

/// Coded tokens of one head, to be decoded into `out`, `[tokens, head_dim]`.
pub(crate) enum ReadPiece<'a, E> {
    /// The tokens `within` a block that begins at `position`.
    Block {
        set: &'a StreamSet,
        block: &'a Block,
        head: usize,
        position: usize,
        within: Range<usize>,
        out: &'a mut [E],
    },
    Vectors {
        coder: &'a LowRank,
        coded: &'a [u8],
        out: &'a mut [E],
    },
}

impl<E: Element> ReadPiece<'_, E> {
    pub(crate) fn read(self) -> Result<()> {
        match self {
            Self::Block { set, block, head, position, within, out } => with_workspace(|workspace| {
                let (len, d, scratch) = (set.block_len(), set.head_dim(), &mut workspace.scratch);
                if within.len() == len {
                    return block.decode(set, head, position, best_isa(), out, scratch);
                }
                let mut whole = memory::filled(len * d, E::default(), "a decoded block")?;
                block.decode(set, head, position, best_isa(), &mut whole, scratch)?;
                out.copy_from_slice(&whole[within.start * d..within.end * d]);
                Ok(())
            }),
            Self::Vectors { coder, coded, out } => {
                let vectors = coded.chunks_exact(coder.vector_bytes());
                for (bytes, out) in vectors.zip(out.chunks_exact_mut(coder.head_dim())) {
                    coder.decode(bytes, out);
                }
                Ok(())
            }
        }
    }
}
