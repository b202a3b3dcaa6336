//! Which tokens stay exact, and which are held at all.

use std::num::NonZeroUsize;
use std::ops::Range;

/// Which tokens stay exact, and which are held at all; all in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// The first tokens of a sequence, which everything attends to; exact always.
    pub n_sinks: usize,
    /// Nothing is coded until the sequence is longer than this.
    pub compress_start_len: usize,
    /// The last tokens stay exact; up to a block less one more do, because blocks are coded whole.
    pub n_tail: usize,
    /// Sliding-window attention: a query sees the last so many tokens at most, its own included. `None`: all of them.
    pub window: Option<NonZeroUsize>,
}

impl Policy {
    /// Positions that any of the last `n_queries` of `n_tokens` tokens may see: all, or those of the window.
    #[must_use]
    pub fn seen(&self, n_queries: usize, n_tokens: usize) -> Range<usize> {
        self.first_seen(n_tokens.saturating_sub(n_queries))..n_tokens
    }

    /// Position of the first token that a query behind `n_past` tokens sees.
    #[must_use]
    pub fn first_seen(&self, n_past: usize) -> usize {
        self.window.map_or(0, |window| n_past.saturating_sub(window.get() - 1))
    }
}
