//! Attention straight from the packed blocks: exact parts and blocks join one softmax, nothing is expanded.
//!
//! A head's tokens are cut into segments that threads work on independently; each keeps its own running maximum and
//! sum, and the results are merged at the end (as in split-k flash decoding).

use kvlathe_codec::{CoefficientSums, Element, Scratch, StreamSet, best_isa, product, weigh};
use rayon::prelude::*;

use crate::error::{CacheError, Result};
use crate::layer::LayerCache;
use crate::side::SideRow;
use crate::view::TensorView;

/// Blocks of a segment: enough to make a task worth its start.
const SEGMENT_BLOCKS: usize = 32;
/// Exact tokens that are multiplied together.
const TILE_TOKENS: usize = 32;

/// What attention does beyond softmax(q·k)·v.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Factor on q·k.
    pub scaling: f32,
    /// Which keys a query sees, `[1 or batch, n_queries, n_tokens]`, nonzero = seen. Without it attention is causal,
    /// the last query at the last token.
    pub mask: Option<&'a [u8]>,
    /// Scores become c·tanh(score / c).
    pub softcap: Option<f32>,
    /// One score a query head that joins the softmax without a value (gpt-oss).
    pub sink_scores: Option<&'a [f32]>,
}

/// Where a query may look.
#[derive(Clone, Copy)]
struct Visibility<'a> {
    mask: Option<&'a [u8]>,
    n_queries: usize,
    n_tokens: usize,
}

impl Visibility<'_> {
    fn sees(&self, query: usize, token: usize) -> bool {
        match self.mask {
            Some(mask) => mask[query * self.n_tokens + token] != 0,
            None => token + self.n_queries <= self.n_tokens + query,
        }
    }

    /// Whether a run of tokens needs no look at single ones.
    fn sees_all(&self, tokens: std::ops::Range<usize>) -> bool {
        match self.mask {
            Some(mask) => (0..self.n_queries)
                .all(|q| mask[q * self.n_tokens..][tokens.clone()].iter().all(|&seen| seen != 0)),
            None => tokens.end + self.n_queries <= self.n_tokens + 1,
        }
    }
}

/// What one segment found, for the queries of one KV head.
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[n, value_dim]`.
    out: Vec<f32>,
}

/// The work of one KV head: queries `[n, key_dim]`, `n` = group · queries, a head's queries one after another.
struct Head<'a, E> {
    key: &'a SideRow<E>,
    value: &'a SideRow<E>,
    keys: &'a StreamSet,
    values: &'a StreamSet,
    head: usize,
    queries: &'a [f32],
    visibility: Visibility<'a>,
    options: AttentionOptions<'a>,
}

impl<E: Element> Head<'_, E> {
    fn n(&self) -> usize {
        self.queries.len() / self.keys.head_dim()
    }

    /// Scales, caps and masks the scores `[n, width]` of the tokens from `first` on; those from `valid` on are padding.
    fn finish_scores(&self, scores: &mut [f32], width: usize, first: usize, valid: usize) {
        let AttentionOptions { scaling, softcap, .. } = self.options;
        scores.iter_mut().for_each(|s| *s *= scaling);
        if let Some(cap) = softcap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        if valid == width && self.visibility.sees_all(first..first + width) {
            return;
        }
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let query = row % self.visibility.n_queries;
            for (t, score) in scores.iter_mut().enumerate() {
                if t >= valid || !self.visibility.sees(query, first + t) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Blocks `range` of the coded middle.
    fn blocks(&self, range: std::ops::Range<usize>) -> Result<Partial> {
        let (n, len, isa) = (self.n(), self.keys.block_len(), best_isa());
        let (stream_k, stream_v) = (&self.keys.streams()[self.head], &self.values.streams()[self.head]);
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; n], vec![0.0; n]);
        let mut rescale = vec![1.0; n];
        let mut scores = vec![0.0; n * len];
        let mut sums = CoefficientSums::new(stream_v, n);
        let mut scratch = Scratch::default();
        let first = self.key.n_sinks_held() + range.start * len;
        let mut walk = self.keys.rope().map(|rope| rope.walk_back((first + len / 2) as i64, len as i64));
        for (i, at) in range.enumerate() {
            let turn_back = walk.as_ref().map(|walk| walk.rotation());
            let packed = &self.key.block(at)[self.keys.head_range(self.head)];
            stream_k.score_block(isa, packed, turn_back, self.queries, &mut scores, &mut scratch)?;
            self.finish_scores(&mut scores, len, first + i * len, len);
            weigh(isa, &mut scores, len, &mut max, &mut sum, &mut rescale);
            for (query, &factor) in rescale.iter().enumerate() {
                if factor != 1.0 {
                    sums.scale(query, factor);
                }
            }
            let packed = &self.value.block(at)[self.values.head_range(self.head)];
            stream_v.accumulate_block(isa, packed, &scores, &mut sums, &mut scratch)?;
            if let Some(walk) = &mut walk {
                walk.advance();
            }
        }
        let mut out = vec![0.0; n * self.values.head_dim()];
        stream_v.finish_sums(&sums, &mut out)?;
        Ok(Partial { max, sum, out })
    }

    /// Sinks and tail.
    fn exact(&self) -> Partial {
        let (n, value_dim) = (self.n(), self.values.head_dim());
        let mut partial =
            Partial { max: vec![f32::NEG_INFINITY; n], sum: vec![0.0; n], out: vec![0.0; n * value_dim] };
        let n_sinks = self.key.n_sinks_held();
        let tail_at = n_sinks + self.key.n_coded();
        for ((keys, first), values) in [(self.key.sinks(self.head), 0), (self.key.tail(self.head), tail_at)]
            .into_iter()
            .zip([self.value.sinks(self.head), self.value.tail(self.head)])
        {
            let tiles =
                keys.chunks(TILE_TOKENS * self.keys.head_dim()).zip(values.chunks(TILE_TOKENS * value_dim));
            for (i, (keys, values)) in tiles.enumerate() {
                self.exact_tile(keys, values, first + i * TILE_TOKENS, &mut partial);
            }
        }
        partial
    }

    /// Up to [`TILE_TOKENS`] exact tokens, `[tokens, dim]`.
    fn exact_tile(&self, keys: &[E], values: &[E], first: usize, partial: &mut Partial) {
        let (n, key_dim, value_dim) = (self.n(), self.keys.head_dim(), self.values.head_dim());
        let isa = best_isa();
        let mut transposed = vec![0.0f32; key_dim * TILE_TOKENS];
        for (t, key) in keys.chunks_exact(key_dim).enumerate() {
            key.iter().enumerate().for_each(|(j, v)| transposed[j * TILE_TOKENS + t] = v.to_f32());
        }
        let mut scores = vec![0.0f32; n * TILE_TOKENS];
        product(isa, self.queries, &transposed, &mut scores, (key_dim, TILE_TOKENS));
        self.finish_scores(&mut scores, TILE_TOKENS, first, keys.len() / key_dim);
        let mut rescale = vec![1.0; n];
        weigh(isa, &mut scores, TILE_TOKENS, &mut partial.max, &mut partial.sum, &mut rescale);
        let mut wide = vec![0.0f32; TILE_TOKENS * value_dim];
        wide.iter_mut().zip(values).for_each(|(w, v)| *w = v.to_f32());
        let mut added = vec![0.0f32; n * value_dim];
        product(isa, &scores, &wide, &mut added, (TILE_TOKENS, value_dim));
        for ((out, added), factor) in
            partial.out.chunks_exact_mut(value_dim).zip(added.chunks_exact(value_dim)).zip(&rescale)
        {
            out.iter_mut().zip(added).for_each(|(o, a)| *o = o.mul_add(*factor, *a));
        }
    }
}

impl<E: Element> LayerCache<E> {
    /// Whether [`LayerCache::attend`] can serve: both sides coded in blocks, vectors of a multiple of eight components.
    #[must_use]
    pub fn can_attend(&self) -> bool {
        self.stream_sets()
            .is_some_and(|(k, v)| k.head_dim().is_multiple_of(8) && v.head_dim().is_multiple_of(8))
    }

    /// Attention of `queries` `[batch, query heads, n_queries, key_dim]` over all tokens, the newest included.
    ///
    /// `out` is `[batch, n_queries, query heads, value_dim]`. Query head h reads KV head h / (query heads / KV heads).
    ///
    /// # Errors
    /// Shapes that do not fit, or a layer for which [`LayerCache::can_attend`] is false.
    pub fn attend(
        &self,
        queries: TensorView<'_, E>,
        options: AttentionOptions<'_>,
        out: &mut [E],
    ) -> Result<()> {
        let [batch, query_heads, n_queries, dim] = queries.shape();
        let (Some((keys, values)), true) = (self.stream_sets(), self.can_attend()) else {
            return Err(CacheError::NotFused);
        };
        let heads = keys.streams().len();
        self.check_queries(&queries, keys.head_dim(), &options, out.len(), values.head_dim())?;
        let group = query_heads / heads;
        let (n_tokens, value_dim) = (self.n_tokens(), values.head_dim());

        let results: Vec<Partial> = (0..batch * heads)
            .into_par_iter()
            .map(|at| {
                let (row, head) = (at / heads, at % heads);
                let mut wide = Vec::with_capacity(group * n_queries * dim);
                for member in 0..group {
                    for query in 0..n_queries {
                        let vector = queries.token(row, head * group + member, query);
                        wide.extend(vector.iter().map(|v| v.to_f32()));
                    }
                }
                let per_row = n_queries * n_tokens;
                let mask =
                    options.mask.map(|m| if m.len() == per_row { m } else { &m[row * per_row..][..per_row] });
                let (key, value) = self.sides(row);
                let head = Head {
                    key,
                    value,
                    keys,
                    values,
                    head,
                    queries: &wide,
                    visibility: Visibility { mask, n_queries, n_tokens },
                    options,
                };
                head_attention(&head, group)
            })
            .collect::<Result<_>>()?;

        for (at, partial) in results.iter().enumerate() {
            let (row, head) = (at / heads, at % heads);
            for (i, vector) in partial.out.chunks_exact(value_dim).enumerate() {
                let (member, query) = (i / n_queries, i % n_queries);
                let to = ((row * n_queries + query) * query_heads + head * group + member) * value_dim;
                // A query that sees nothing (a padding row) gets zeros, not NaN.
                let inverse = if partial.sum[i] > 0.0 { 1.0 / partial.sum[i] } else { 0.0 };
                for (o, v) in out[to..to + value_dim].iter_mut().zip(vector) {
                    *o = E::from_f32(v * inverse);
                }
            }
        }
        Ok(())
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
        let per_row = n_queries * self.n_tokens();
        let mask_fits = options.mask.is_none() || masked == per_row || masked == batch * per_row;
        for (what, given, expected) in [
            ("the queries' batch size", batch, self.batch()),
            ("head_dim of the queries", dim, key_dim),
            ("the number of query heads over that of KV heads, remainder", query_heads % heads, 0),
            ("the size of the attention mask", masked, if mask_fits { masked } else { batch * per_row }),
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

/// All segments of one head, merged.
fn head_attention<E: Element>(head: &Head<'_, E>, group: usize) -> Result<Partial> {
    let n_blocks = head.key.n_blocks();
    let n_segments = n_blocks.div_ceil(SEGMENT_BLOCKS);
    let mut partials: Vec<Partial> = (0..n_segments)
        .into_par_iter()
        .map(|s| head.blocks(s * SEGMENT_BLOCKS..n_blocks.min((s + 1) * SEGMENT_BLOCKS)))
        .collect::<Result<_>>()?;
    let mut total = head.exact();
    partials.drain(..).for_each(|partial| merge(&mut total, &partial));
    if let Some(scores) = head.options.sink_scores {
        for (i, sum) in total.sum.iter_mut().enumerate() {
            let score = scores[head.head * group + i / head.visibility.n_queries];
            let largest = total.max[i].max(score);
            let shrink = (total.max[i] - largest).exp();
            *sum = *sum * shrink + (score - largest).exp();
            let value_dim = head.values.head_dim();
            total.out[i * value_dim..(i + 1) * value_dim].iter_mut().for_each(|v| *v *= shrink);
        }
    }
    Ok(total)
}

/// Adds another segment's result: both are brought to the larger maximum.
fn merge(total: &mut Partial, other: &Partial) {
    let value_dim = total.out.len() / total.max.len();
    for q in 0..total.max.len() {
        let largest = total.max[q].max(other.max[q]);
        if largest == f32::NEG_INFINITY {
            continue;
        }
        let (ours, theirs) = ((total.max[q] - largest).exp(), (other.max[q] - largest).exp());
        total.sum[q] = total.sum[q] * ours + other.sum[q] * theirs;
        let out = &mut total.out[q * value_dim..(q + 1) * value_dim];
        for (o, v) in out.iter_mut().zip(&other.out[q * value_dim..(q + 1) * value_dim]) {
            *o = *o * ours + v * theirs;
        }
        total.max[q] = largest;
    }
}
