//! Tokens kept bit for bit in the model's number format: sinks, tail, and whole sides that are not compressed.

use kvlathe_codec::{Element, Tokens};

use crate::view::TensorView;

/// A run of consecutive tokens of one batch row, `[heads][tokens, head_dim]`.
#[derive(Debug, Clone)]
pub(crate) struct ExactRun<E> {
    heads: Vec<Vec<E>>,
    head_dim: usize,
}

impl<E: Element> ExactRun<E> {
    pub(crate) fn new(n_heads: usize, head_dim: usize) -> Self {
        Self { heads: vec![Vec::new(); n_heads], head_dim }
    }

    pub(crate) fn n_tokens(&self) -> usize {
        self.heads[0].len() / self.head_dim
    }

    /// One head's vectors, `[tokens, head_dim]`.
    pub(crate) fn head(&self, head: usize) -> &[E] {
        &self.heads[head]
    }

    /// One head's vectors from `token` on, for the encoder.
    pub(crate) fn tokens_from(&self, head: usize, token: usize) -> Tokens<'_, E> {
        Tokens { data: &self.heads[head][token * self.head_dim..], token_stride: self.head_dim }
    }

    /// Appends tokens `range` of one row of a tensor.
    pub(crate) fn append(&mut self, view: &TensorView<'_, E>, row: usize, range: std::ops::Range<usize>) {
        for (head, run) in self.heads.iter_mut().enumerate() {
            let more = range.len() * self.head_dim;
            if run.capacity() < run.len() + more {
                // An eighth of headroom: amortised growth without doubling the memory.
                run.reserve_exact(more.max(run.len() / 8));
            }
            for token in range.clone() {
                run.extend_from_slice(view.token(row, head, token));
            }
        }
    }

    /// Puts decoded tokens, `[heads][tokens, head_dim]`, before the others.
    pub(crate) fn prepend(&mut self, decoded: &[Vec<E>]) {
        for (run, front) in self.heads.iter_mut().zip(decoded) {
            run.splice(0..0, front.iter().copied());
        }
    }

    pub(crate) fn drop_front(&mut self, n_tokens: usize) {
        for run in &mut self.heads {
            run.drain(..n_tokens * self.head_dim);
            // After a long prompt has been packed, its exact copy must not linger as capacity.
            if run.capacity() > run.len() + 128 * self.head_dim {
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
