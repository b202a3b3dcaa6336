//! How a side of a layer is stored: the codec, and what it takes.

use std::sync::Arc;

use kvlathe_codec::gain::MAX_MAGNITUDE;
use kvlathe_codec::{CodecError, Element, StreamSet};

use crate::error::{CacheError, Result};
use crate::view::TensorView;

/// How a side of a layer is stored beyond its exact parts.
#[derive(Debug, Clone)]
pub enum Coding {
    /// Not at all: every token stays exact.
    Exact,
    /// The calibrated codec, in blocks.
    Blocks(Arc<StreamSet>),
}

impl Coding {
    /// The codec, where there is one.
    pub(crate) fn stream_set(&self) -> Option<&Arc<StreamSet>> {
        match self {
            Self::Exact => None,
            Self::Blocks(set) => Some(set),
        }
    }

    /// Checks that heads and head_dim of the model are those of the codec.
    pub(crate) fn check_shape(&self, n_heads: usize, head_dim: usize) -> Result<()> {
        let Some(set) = self.stream_set() else { return Ok(()) };
        for (what, given, expected) in
            [("the number of KV heads", n_heads, set.streams().len()), ("head_dim", head_dim, set.head_dim())]
        {
            if given != expected {
                return Err(CacheError::Shape { what, given, expected });
            }
        }
        Ok(())
    }

    /// Refuses what the codec could not store; `side` names the tensor in the message.
    ///
    /// # Errors
    /// NaN, infinity or a magnitude above [`MAX_MAGNITUDE`]. Exact sides take anything.
    pub fn check_values<E: Element>(&self, view: &TensorView<'_, E>, side: &'static str) -> Result<()> {
        if matches!(self, Self::Exact) {
            return Ok(());
        }
        let [rows, heads, tokens, _] = view.shape();
        for row in 0..rows {
            for head in 0..heads {
                for token in 0..tokens {
                    let fits = |v: &E| v.to_f32().abs() <= MAX_MAGNITUDE;
                    if !view.token(row, head, token).iter().fold(true, |all, v| all & fits(v)) {
                        return Err(CodecError::BadActivation { side, head, token }.into());
                    }
                }
            }
        }
        Ok(())
    }
}
