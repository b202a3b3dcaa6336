//! Which keys a query sees.

use std::ops::Range;

/// Where the queries of one sequence may look.
#[derive(Clone, Copy)]
pub(super) struct Visibility<'a> {
    /// `[n_queries, n_tokens]`, nonzero = seen; without it attention is causal, the last query at the last token.
    pub(super) mask: Option<&'a [u8]>,
    pub(super) n_queries: usize,
    pub(super) n_tokens: usize,
}

impl Visibility<'_> {
    fn sees(&self, query: usize, token: usize) -> bool {
        match self.mask {
            Some(mask) => mask[query * self.n_tokens + token] != 0,
            None => token + self.n_queries <= self.n_tokens + query,
        }
    }

    /// Whether every query sees all of a run of tokens.
    fn sees_all(&self, tokens: Range<usize>) -> bool {
        match self.mask {
            Some(mask) => (0..self.n_queries)
                .all(|q| mask[q * self.n_tokens..][tokens.clone()].iter().all(|&seen| seen != 0)),
            None => tokens.end + self.n_queries <= self.n_tokens + 1,
        }
    }

    /// Sets scores `[group · n_queries, width]` of the tokens from `first` on to −∞ where nothing is seen.
    pub(super) fn hide(&self, scores: &mut [f32], width: usize, first: usize) {
        if self.sees_all(first..first + width) {
            return;
        }
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let query = row % self.n_queries;
            for (t, score) in scores.iter_mut().enumerate() {
                if !self.sees(query, first + t) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}
