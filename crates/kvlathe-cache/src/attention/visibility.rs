//! Which keys a query sees.

use std::ops::Range;

/// The run of tokens that each row of a mask `[rows, n_tokens]` shows, if none shows several: masks of causal attention,
/// of padding and of windows do not. To look at a mask once is cheaper than for each tile of each head.
pub(super) fn spans(mask: &[u8], n_tokens: usize) -> Option<Vec<Range<usize>>> {
    let of_row = |row: &[u8]| {
        let n_seen: usize = row.iter().map(|&seen| usize::from(seen != 0)).sum();
        let Some(first) = row.iter().position(|&seen| seen != 0) else {
            return Some(0..0);
        };
        let end = row.iter().rposition(|&seen| seen != 0).map_or(first, |last| last + 1);
        (n_seen == end - first).then_some(first..end)
    };
    mask.chunks_exact(n_tokens).map(of_row).collect()
}

/// Where the queries of one sequence may look.
#[derive(Clone, Copy)]
pub(super) struct Visibility<'a> {
    /// `[n_queries, n_tokens]`, nonzero = seen; without it attention is causal, the last query at the last token.
    pub(super) mask: Option<&'a [u8]>,
    /// `[n_queries]`: the mask's [`spans`], where they were made and it has them.
    pub(super) spans: Option<&'a [Range<usize>]>,
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
        if let Some(spans) = self.spans {
            let (mut all, mut any) = (true, false);
            for row in rows.start..rows.end.min(rows.start + self.n_queries) {
                let span = &spans[row % self.n_queries];
                all &= span.start <= tokens.start && tokens.end <= span.end;
                any |= span.start < tokens.end && tokens.start < span.end;
            }
            return match (all, any) {
                (true, _) => Sight::All,
                (_, true) => Sight::Some,
                _ => Sight::None,
            };
        }
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

#[cfg(test)]
mod tests {
    use super::{Sight, Visibility, spans};

    #[test]
    fn spans_say_what_the_mask_says() {
        let (n_queries, n_tokens) = (3, 6);
        let causal_behind_padding = [0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0];
        let found = spans(&causal_behind_padding, n_tokens).expect("one run each");
        assert_eq!(found, [1..4, 1..5, 0..0]);
        assert!(spans(&[1, 0, 1], 3).is_none(), "two runs");

        let mask = Some(&causal_behind_padding[..]);
        let plain = Visibility { mask, spans: None, n_queries, n_tokens };
        let quick = Visibility { spans: Some(&found), ..plain };
        let name = |sight| match sight {
            Sight::All => "all",
            Sight::Some => "some",
            Sight::None => "none",
        };
        // Two query heads' rows.
        for first in 0..2 * n_queries {
            for end in first + 1..=2 * n_queries {
                for start in 0..n_tokens {
                    for stop in start + 1..=n_tokens {
                        let of = |which: &Visibility<'_>| name(which.sight(first..end, start..stop));
                        assert_eq!(of(&plain), of(&quick), "rows {first}..{end}, tokens {start}..{stop}");
                    }
                }
            }
        }
    }
}
