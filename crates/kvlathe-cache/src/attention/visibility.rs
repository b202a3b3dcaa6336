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
    /// `[n_queries, n_tokens − first_seen]`, nonzero = seen; without it attention is causal, the last query at the last token.
    pub(super) mask: Option<&'a [u8]>,
    /// `[n_queries]`: the mask's [`spans`], where they were made and it has them.
    pub(super) spans: Option<&'a [Range<usize>]>,
    /// Tokens that a query sees at most, its own included; a mask has this in it.
    pub(super) window: usize,
    pub(super) n_queries: usize,
    /// Position of the mask's first token; nobody sees an earlier one.
    pub(super) first_seen: usize,
    /// Position behind the last token.
    pub(super) n_tokens: usize,
}

/// How much of some tokens some queries see.
pub(super) enum Sight {
    All,
    Some,
    None,
}

impl Visibility<'_> {
    fn mask_row<'a>(&self, mask: &'a [u8], query: usize) -> &'a [u8] {
        let n_columns = self.n_tokens - self.first_seen;
        &mask[query * n_columns..][..n_columns]
    }

    /// Positions that a query sees, where they are one run and that is known.
    fn span(&self, query: usize) -> Option<Range<usize>> {
        match (self.mask, self.spans) {
            (None, _) => {
                let end = self.n_tokens - self.n_queries + query + 1;
                Some(end.saturating_sub(self.window)..end)
            }
            (_, Some(spans)) => {
                Some(self.first_seen + spans[query].start..self.first_seen + spans[query].end)
            }
            _ => None,
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
            let (first, last) = (offset + first, offset + last);
            return match () {
                () if tokens.end <= first + 1 && last.saturating_sub(tokens.start) < self.window => {
                    Sight::All
                }
                () if tokens.start > last || (first + 1).saturating_sub(tokens.end) >= self.window => {
                    Sight::None
                }
                () => Sight::Some,
            };
        };
        if tokens.end <= self.first_seen {
            return Sight::None;
        }
        let begins_before = tokens.start < self.first_seen;
        let columns = tokens.start.max(self.first_seen) - self.first_seen..tokens.end - self.first_seen;
        if let Some(spans) = self.spans {
            let (mut all, mut any) = (true, false);
            for row in rows.start..rows.end.min(rows.start + self.n_queries) {
                let span = &spans[row % self.n_queries];
                all &= span.start <= columns.start && columns.end <= span.end;
                any |= span.start < columns.end && columns.start < span.end;
            }
            return match (all, any) {
                (true, _) if !begins_before => Sight::All,
                (_, true) => Sight::Some,
                _ => Sight::None,
            };
        }
        // Folds without an early end, for the vectoriser.
        let (mut all, mut any) = (u8::MAX, 0);
        for row in rows.start..rows.end.min(rows.start + self.n_queries) {
            let row = &self.mask_row(mask, row % self.n_queries)[columns.clone()];
            all = row.iter().fold(all, |all, &seen| all & (0u8.wrapping_sub(u8::from(seen != 0))));
            any = row.iter().fold(any, |any, &seen| any | seen);
        }
        match (all, any) {
            (u8::MAX, _) if !begins_before => Sight::All,
            (_, 0) => Sight::None,
            _ => Sight::Some,
        }
    }

    /// Sets scores `[rows, width]` to −∞ where nothing is seen: those of tokens that a query does not see, and of columns
    /// outside `held`, which stand for no token. Column 0 has position `first`.
    pub(super) fn hide(
        &self,
        scores: &mut [f32],
        (width, held): (usize, Range<usize>),
        first: usize,
        rows: Range<usize>,
    ) {
        if held.len() < width {
            for row in scores.chunks_exact_mut(width) {
                row[..held.start].fill(f32::NEG_INFINITY);
                row[held.end..].fill(f32::NEG_INFINITY);
            }
        }
        let (first, valid) = (first + held.start, held.len());
        if matches!(self.sight(rows.clone(), first..first + valid), Sight::All) {
            return;
        }
        for (row, scores) in rows.zip(scores.chunks_exact_mut(width)) {
            let (query, scores) = (row % self.n_queries, &mut scores[held.clone()]);
            if let Some(span) = self.span(query) {
                let column = |position: usize| position.saturating_sub(first).min(valid);
                scores[..column(span.start)].fill(f32::NEG_INFINITY);
                scores[column(span.end)..].fill(f32::NEG_INFINITY);
            } else if let Some(mask) = self.mask {
                let n_before = self.first_seen.saturating_sub(first).min(valid);
                let (before, scores) = scores.split_at_mut(n_before);
                before.fill(f32::NEG_INFINITY);
                let seen = &self.mask_row(mask, query)[(first + n_before).saturating_sub(self.first_seen)..];
                for (score, &seen) in scores.iter_mut().zip(seen) {
                    *score = if seen == 0 { f32::NEG_INFINITY } else { *score };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::{Sight, Visibility, spans};

    #[test]
    fn spans_say_what_the_mask_says() {
        let (n_queries, n_tokens) = (3, 6);
        let causal_behind_padding = [0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0];
        let found = spans(&causal_behind_padding, n_tokens).expect("one run each");
        assert_eq!(found, [1..4, 1..5, 0..0]);
        assert!(spans(&[1, 0, 1], 3).is_none(), "two runs");

        let mask = Some(&causal_behind_padding[..]);
        let window = usize::MAX;
        let plain = Visibility { mask, spans: None, window, n_queries, first_seen: 0, n_tokens };
        let quick = Visibility { spans: Some(&found), ..plain };
        let sees = |query: usize, token: usize| causal_behind_padding[query * n_tokens + token] != 0;
        same_as(&plain, sees);
        same_as(&quick, sees);
        // Behind two tokens that have left a window.
        let sees = |query: usize, token: usize| token >= 2 && sees(query, token - 2);
        same_as(&Visibility { first_seen: 2, n_tokens: n_tokens + 2, ..plain }, sees);
        same_as(&Visibility { first_seen: 2, n_tokens: n_tokens + 2, ..quick }, sees);
    }

    #[test]
    fn a_window_hides_what_is_older() {
        for (n_queries, window) in [(1, 1), (1, 4), (3, 2), (3, 5), (3, usize::MAX)] {
            let (spans, n_tokens) = (None, 7);
            let seen = Visibility { mask: None, spans, window, n_queries, first_seen: 0, n_tokens };
            let place = |query: usize| n_tokens - n_queries + query;
            same_as(&seen, |query, token| token <= place(query) && place(query) - token < window);
        }
    }

    /// What `hide` and `sight` say of all runs of tokens and rows of two query heads, against what each query sees.
    fn same_as(visibility: &Visibility<'_>, sees: impl Fn(usize, usize) -> bool) {
        let (n_queries, n_tokens) = (visibility.n_queries, visibility.n_tokens);
        for rows in runs(2 * n_queries) {
            for tokens in runs(n_tokens) {
                let seen: Vec<bool> = rows
                    .clone()
                    .flat_map(|row| tokens.clone().map(move |token| (row % n_queries, token)))
                    .map(|(query, token)| sees(query, token))
                    .collect();
                let expected = match (seen.iter().all(|&s| s), seen.iter().any(|&s| s)) {
                    (true, _) => "all",
                    (_, true) => "some",
                    _ => "none",
                };
                let given = match visibility.sight(rows.clone(), tokens.clone()) {
                    Sight::All => "all",
                    Sight::Some => "some",
                    Sight::None => "none",
                };
                // Rows of several heads may be taken for all of them.
                let is_careful = given == "some" && rows.start / n_queries != (rows.end - 1) / n_queries;
                assert!(given == expected || is_careful, "{given} for {expected}: {rows:?} of {tokens:?}");

                // A column of padding, which nobody sees, and as many placeholders as there are tokens in front.
                let held = tokens.start.min(2)..tokens.start.min(2) + tokens.len();
                let width = held.end + 1;
                let mut scores = vec![1.0; rows.len() * width];
                let first = tokens.start - held.start;
                visibility.hide(&mut scores, (width, held.clone()), first, rows.clone());
                let shown: Vec<bool> = scores.chunks_exact(width).flatten().map(|s| *s == 1.0).collect();
                let with_padding: Vec<bool> = seen
                    .chunks_exact(tokens.len())
                    .flat_map(|row| {
                        std::iter::repeat_n(false, held.start).chain(row.iter().copied()).chain([false])
                    })
                    .collect();
                assert_eq!(shown, with_padding, "{rows:?} of {tokens:?}");
            }
        }
    }

    /// All runs of some of the first `n`.
    fn runs(n: usize) -> impl Iterator<Item = Range<usize>> {
        (0..n).flat_map(move |first| (first + 1..=n).map(move |end| first..end))
    }
}
