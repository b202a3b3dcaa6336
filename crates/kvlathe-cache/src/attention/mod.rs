//! Attention straight from the packed blocks: exact parts and blocks join one softmax, nothing is expanded.
//!
//! Every head's tokens are cut into parts that threads work on independently; each keeps its own maximum and sum, and
//! the results are joined at the end (as in split-k flash decoding).

mod few;
mod head;
mod many;
mod partial;
mod visibility;

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::ops::Range;

use kvlathe_codec::{Aligned, Element, StreamSet};

use crate::error::{CacheError, Result};
use crate::layer::{LayerCache, check_held};
use crate::view::TensorView;
use crate::workspace::with_workspace;
use head::Head;
use partial::Partial;
use visibility::{Visibility, spans};

/// Multiply-adds that one thread does in the time it takes to wake another.
const WORTH_WAKING: usize = 500_000;

/// What a call works with beside its output.
#[derive(Default)]
struct Buffers {
    queries: Aligned<f32>,
    few: few::Buffers,
}

thread_local! {
    static KEPT: RefCell<Buffers> = RefCell::default();
}

/// Queries in float32, times the attention's scaling.
fn widen<E: Element>(queries: &TensorView<'_, E>, scaling: f32, wide: &mut Aligned<f32>) -> Result<()> {
    let [batch, query_heads, n_queries, dim] = queries.shape();
    wide.resize(batch * query_heads * n_queries * dim, "queries")?;
    let mut vectors = wide.chunks_exact_mut(dim);
    for row in 0..batch {
        for query_head in 0..query_heads {
            for query in 0..n_queries {
                let wide = vectors.next().expect("a vector for each query");
                for (wide, v) in wide.iter_mut().zip(queries.token(row, query_head, query)) {
                    *wide = v.to_f32() * scaling;
                }
            }
        }
    }
    Ok(())
}

/// What attention does beyond softmax(q·k)·v.
#[derive(Debug, Clone, Copy)]
pub struct AttentionOptions<'a> {
    /// Factor on q·k.
    pub scaling: f32,
    /// Which keys a query sees, `[1 or batch, n_queries, n_seen]`, nonzero = seen; `n_seen` are the last tokens, those
    /// that [`Policy::seen`](crate::Policy::seen) says. Without it attention is causal, the last query at the last token.
    pub mask: Option<&'a [u8]>,
    /// Scores become c·tanh(score / c).
    pub softcap: Option<f32>,
    /// One score a query head that joins the softmax without a value (gpt-oss).
    pub sink_scores: Option<&'a [f32]>,
}

impl Default for AttentionOptions<'_> {
    /// Causal, with scores as they are.
    fn default() -> Self {
        Self { scaling: 1.0, mask: None, softcap: None, sink_scores: None }
    }
}

/// Where a call writes.
struct Output<'a, E> {
    /// `[batch, n_queries, query heads, value_dim]`.
    out: &'a mut [E],
    /// `[batch, query heads, n_queries]`.
    lse: Option<&'a mut [f32]>,
}

/// One call: what all of its parts read.
struct Call<'a, E> {
    layer: &'a LayerCache<E>,
    keys: &'a StreamSet,
    values: &'a StreamSet,
    /// `[batch, query heads, n_queries, key_dim]` times the attention's scaling: those of one KV head lie together.
    queries: &'a [f32],
    batch: usize,
    query_heads: usize,
    n_queries: usize,
    options: AttentionOptions<'a>,
    /// Position of the first token that a query may see, the mask's first.
    first_seen: usize,
    /// Of the mask's rows, `[1 or batch, n_queries]`, where there are queries enough to look at it in advance.
    spans: Option<&'a [Range<usize>]>,
}

impl<E: Element> Call<'_, E> {
    /// KV heads of all sequences.
    fn n_heads(&self) -> usize {
        self.batch * self.layer.n_heads()
    }

    /// Queries of one KV head: those of its group, one query head after another.
    fn n_rows(&self) -> usize {
        self.query_heads / self.layer.n_heads() * self.n_queries
    }

    fn queries_of(&self, at: usize) -> &[f32] {
        let len = self.n_rows() * self.keys.head_dim();
        &self.queries[at * len..(at + 1) * len]
    }

    /// The KV head `at` of all sequences'.
    fn head(&self, at: usize) -> Head<'_, E> {
        let (row, head) = (at / self.layer.n_heads(), at % self.layer.n_heads());
        let (n_queries, first_seen, n_tokens) = (self.n_queries, self.first_seen, self.layer.n_tokens());
        let per_row = n_queries * (n_tokens - first_seen);
        let mask =
            self.options.mask.map(|m| if m.len() == per_row { m } else { &m[row * per_row..][..per_row] });
        let (key, value) = self.layer.sides(row);
        let spans =
            self.spans.map(|s| if s.len() == n_queries { s } else { &s[row * n_queries..][..n_queries] });
        let window = self.layer.policy().window.map_or(usize::MAX, NonZeroUsize::get);
        let visibility = Visibility { mask, spans, window, n_queries, first_seen, n_tokens };
        let (keys, values, queries) = (self.keys, self.values, self.queries_of(at));
        Head { key, value, keys, values, head, queries, visibility, options: self.options }
    }

    /// Writes what the queries of head `at` from `first` on have found.
    fn write(&self, at: usize, first: usize, found: &mut Partial, to: &mut Output<'_, E>) -> Result<()> {
        let (row, head) = (at / self.layer.n_heads(), at % self.layer.n_heads());
        let (n_queries, first_head) = (self.n_queries, head * self.query_heads / self.layer.n_heads());
        if let Some(scores) = self.options.sink_scores {
            for i in 0..found.max.len() {
                found.add_sink(i, scores[first_head + (first + i) / n_queries]);
            }
        }
        let values = &self.values.streams()[head];
        with_workspace(|workspace| found.finish(values, &mut workspace.scratch))?;
        let value_dim = values.head_dim();
        for (i, vector) in found.out.chunks_exact(value_dim).enumerate() {
            let (member, query) = ((first + i) / n_queries, (first + i) % n_queries);
            let query_head = first_head + member;
            let at = ((row * n_queries + query) * self.query_heads + query_head) * value_dim;
            for (o, v) in to.out[at..at + value_dim].iter_mut().zip(vector) {
                *o = E::from_f32(*v);
            }
            if let Some(lse) = &mut to.lse {
                lse[(row * self.query_heads + query_head) * n_queries + query] = found.log_sum_exp(i);
            }
        }
        Ok(())
    }
}

impl<E: Element> LayerCache<E> {
    /// Whether [`LayerCache::attend`] can serve: both sides coded in blocks, vectors of a multiple of eight components.
    #[must_use]
    pub fn can_attend(&self) -> bool {
        self.stream_sets()
            .is_some_and(|(k, v)| k.head_dim().is_multiple_of(8) && v.head_dim().is_multiple_of(8))
    }

    /// Attention of `queries` `[batch, query heads, n_queries, key_dim]` over all tokens, or those of a window, the newest
    /// included, on at most `n_threads` threads.
    ///
    /// `out` is `[batch, n_queries, query heads, value_dim]`. Query head h reads KV head h / (query heads / KV heads).
    /// `lse` receives log Σ e^score of each query, `[batch, query heads, n_queries]`, with which its output can be joined to
    /// that over other tokens, as flash decoding joins its parts: −∞ where it saw nothing. A score of
    /// [`AttentionOptions::sink_scores`] is among the summands.
    ///
    /// # Errors
    /// Shapes that do not fit, a layer for which [`LayerCache::can_attend`] is false, a window that begins before the
    /// tokens still held, no memory.
    pub fn attend(
        &self,
        queries: TensorView<'_, E>,
        options: AttentionOptions<'_>,
        out: &mut [E],
        lse: Option<&mut [f32]>,
        n_threads: usize,
    ) -> Result<()> {
        let [batch, query_heads, n_queries, dim] = queries.shape();
        let (Some((keys, values)), true) = (self.stream_sets(), self.can_attend()) else {
            return Err(CacheError::NotFused);
        };
        let seen = self.policy().seen(n_queries, self.n_tokens());
        self.check_queries(&queries, keys.head_dim(), &options, out.len(), values.head_dim())?;
        let (given, expected) = (lse.as_ref().map(|lse| lse.len()), batch * query_heads * n_queries);
        if let Some(given) = given.filter(|given| *given != expected) {
            return Err(CacheError::Buffer { what: "log-sum-exp", given, expected });
        }
        let mut to = Output { out, lse };
        if to.out.is_empty() {
            return Ok(());
        }
        check_held(&seen, self.first())?;
        let work = batch * query_heads * n_queries * seen.len() * (dim + values.head_dim());
        let n_threads = if work < WORTH_WAKING { 1 } else { n_threads.max(1) };
        let n_rows = query_heads / self.n_heads() * n_queries;
        let many = n_rows >= many::MIN_QUERIES;
        let spans = options.mask.filter(|_| many).and_then(|mask| spans(mask, seen.len()));
        let mut attend_with = |buffers: &mut Buffers| {
            let Buffers { queries: wide, few } = buffers;
            widen(&queries, options.scaling, wide)?;
            let (layer, queries, spans) = (self, &**wide, spans.as_deref());
            let first_seen = seen.start;
            let call = Call {
                layer,
                keys,
                values,
                queries,
                batch,
                query_heads,
                n_queries,
                options,
                first_seen,
                spans,
            };
            if many {
                many::attend(&call, &mut to, n_threads)
            } else {
                few::attend(&call, few, &mut to, n_threads)
            }
        };
        if many {
            attend_with(&mut Buffers::default())
        } else {
            // What a step of decoding needs is there when the next one comes.
            KEPT.with_borrow_mut(attend_with)
        }
    }

    fn check_queries(
        &self,
        queries: &TensorView<'_, E>,
        key_dim: usize,
        options: &AttentionOptions<'_>,
        out_len: usize,
        value_dim: usize,
    ) -> Result<()> {
        let [batch, query_heads, n_queries, dim] = queries.shape();
        let heads = self.n_heads();
        let masked = options.mask.map_or(0, <[u8]>::len);
        let per_row = n_queries * self.policy().seen(n_queries, self.n_tokens()).len();
        let mask_fits = options.mask.is_none() || masked == per_row || masked == batch * per_row;
        for (what, given, expected) in [
            ("the queries' batch size", batch, self.batch()),
            ("head_dim of the queries", dim, key_dim),
            ("the number of query heads over that of KV heads, remainder", query_heads % heads, 0),
            ("the size of the attention mask", masked, if mask_fits { masked } else { batch * per_row }),
            ("queries beyond the tokens held", n_queries.saturating_sub(self.n_tokens()), 0),
            ("the size of the attention output", out_len, batch * n_queries * query_heads * value_dim),
        ] {
            if given != expected {
                return Err(CacheError::Shape { what, given, expected });
            }
        }
        match options.sink_scores {
            Some(scores) if scores.len() != query_heads => {
                Err(CacheError::Buffer { what: "sink scores", given: scores.len(), expected: query_heads })
            }
            _ => Ok(()),
        }
    }
}
