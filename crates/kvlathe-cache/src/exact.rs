//! Tokens kept bit for bit in the model's number format: sinks, tail, and whole sides that are not compressed.

use std::ops::Range;

use kvlathe_codec::{Element, memory};

use crate::error::Result;
use crate::view::TensorView;

/// A run of consecutive tokens of one batch row, `[heads][tokens, head_dim]`.
#[derive(Debug)]
pub(crate) struct ExactRun<E> {
    heads: Vec<Vec<E>>,
    head_dim: usize,
}

impl<E: Element> ExactRun<E> {
    pub(crate) fn new(n_heads: usize, head_dim: usize) -> Self {
        Self { heads: vec![Vec::new(); n_heads], head_dim }
    }

    /// Decoded tokens, `[heads][tokens, head_dim]`.
    pub(crate) fn from_decoded(heads: Vec<Vec<E>>, head_dim: usize) -> Self {
        Self { heads, head_dim }
    }

    /// A copy, with the room it needs and no more.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        let heads = self.heads.iter().map(|run| memory::copied(run, "exact tokens"));
        let heads = heads.collect::<std::result::Result<_, _>>()?;
        Ok(Self { heads, head_dim: self.head_dim })
    }

    pub(crate) fn n_tokens(&self) -> usize {
        self.heads[0].len() / self.head_dim
    }

    /// One head's vectors, `[tokens, head_dim]`.
    pub(crate) fn head(&self, head: usize) -> &[E] {
        &self.heads[head]
    }

    /// Copies some of one head's vectors to the front of `out`; gives back the rest of it.
    pub(crate) fn read<'a>(&self, head: usize, tokens: Range<usize>, out: &'a mut [E]) -> &'a mut [E] {
        let vectors = &self.heads[head][tokens.start * self.head_dim..tokens.end * self.head_dim];
        let (front, rest) = out.split_at_mut(vectors.len());
        front.copy_from_slice(vectors);
        rest
    }

    /// Makes room for `n_tokens` more.
    pub(crate) fn reserve(&mut self, n_tokens: usize) -> Result<()> {
        let more = n_tokens.saturating_mul(self.head_dim);
        for run in &mut self.heads {
            if run.capacity() - run.len() < more {
                // An eighth of headroom: amortised growth without doubling the memory.
                memory::reserve(run, more.max(run.len() / 8), "new tokens")?;
            }
        }
        Ok(())
    }

    /// Appends tokens `range` of one row of a tensor, for which there is room.
    pub(crate) fn append(&mut self, view: &TensorView<'_, E>, row: usize, range: Range<usize>) {
        for (head, run) in self.heads.iter_mut().enumerate() {
            for token in range.clone() {
                run.extend_from_slice(view.token(row, head, token));
            }
        }
    }

    pub(crate) fn drop_front(&mut self, n_tokens: usize) {
        for run in &mut self.heads {
            run.drain(..n_tokens * self.head_dim);
        }
        // After a long prompt has been packed, its exact copy must not linger as capacity.
        self.trim();
    }

    /// Gives back room far beyond what is held.
    pub(crate) fn trim(&mut self) {
        for run in &mut self.heads {
            // What `reserve` makes for later is not that much.
            if run.capacity() - run.len() > (128 * self.head_dim).max(run.len() / 4) {
                run.shrink_to(run.len() + 32 * self.head_dim);
            }
        }
    }

    pub(crate) fn truncate(&mut self, n_tokens: usize) {
        for run in &mut self.heads {
            run.truncate(n_tokens * self.head_dim);
        }
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.heads.iter().map(|run| run.capacity() * size_of::<E>()).sum()
    }
}
