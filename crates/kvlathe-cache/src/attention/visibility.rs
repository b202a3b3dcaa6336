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

/// How much of some tokens some queries see.
pub(super) enum Sight {
    All,
    Some,
    None,
}

impl Visibility<'_> {
    fn sees(&self, query: usize, token: usize) -> bool {
        match self.mask {
            Some(mask) => mask[query * self.n_tokens + token] != 0,
            None => token + self.n_queries <= self.n_tokens + query,
        }
    }

    /// Whether rows `rows` (each stands for query row mod `n_queries`) see all of a run of tokens, and whether none.
    pub(super) fn sight(&self, rows: Range<usize>, tokens: Range<usize>) -> Sight {
        let Some(mask) = self.mask else {
            let offset = self.n_tokens - self.n_queries;
            let one_round = rows.start / self.n_queries == (rows.end - 1) / self.n_queries;
            let (first, last) = if one_round {
                (rows.start % self.n_queries, (rows.end - 1) % self.n_queries)
            } else {
                (0, self.n_queries - 1)
            };
            return match () {
                () if tokens.end <= offset + first + 1 => Sight::All,
                () if tokens.start > offset + last => Sight::None,
                () => Sight::Some,
            };
        };
        // Folds without an early end, for the vectoriser.
        let (mut all, mut any) = (u8::MAX, 0);
        for row in rows.start..rows.end.min(rows.start + self.n_queries) {
            let row = &mask[row % self.n_queries * self.n_tokens..][tokens.clone()];
            all = row.iter().fold(all, |all, &seen| all & (0u8.wrapping_sub(u8::from(seen != 0))));
            any = row.iter().fold(any, |any, &seen| any | seen);
        }
        match (all, any) {
            (u8::MAX, _) => Sight::All,
            (_, 0) => Sight::None,
            _ => Sight::Some,
        }
    }

    /// Sets scores `[rows, width]` of the tokens from `first` on to −∞ where nothing is seen. Tokens from the
    /// `valid`-th on are padding.
    pub(super) fn hide(
        &self,
        scores: &mut [f32],
        (width, valid): (usize, usize),
        first: usize,
        rows: Range<usize>,
    ) {
        if valid < width {
            scores.chunks_exact_mut(width).for_each(|row| row[valid..].fill(f32::NEG_INFINITY));
        }
        if matches!(self.sight(rows.clone(), first..first + valid), Sight::All) {
            return;
        }
        for (row, scores) in rows.zip(scores.chunks_exact_mut(width)) {
            let query = row % self.n_queries;
            for (t, score) in scores[..valid].iter_mut().enumerate() {
                if !self.sees(query, first + t) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}
