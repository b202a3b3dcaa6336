//! Attention straight from the packed blocks: exact parts and blocks join one softmax, nothing is expanded.
//!
//! Every head's tokens are cut into parts that threads work on independently; each keeps its own maximum and sum, and
//! the results are joined at the end (as in split-k flash decoding).

mod dense;
mod head;
mod partial;
mod visibility;
mod workspace;

use std::ops::Range;
use std::sync::OnceLock;

use kvlathe_codec::{Element, StreamSet, memory};

use crate::error::{CacheError, Result};
use crate::layer::LayerCache;
use crate::threads::for_each_task;
use crate::view::TensorView;
use head::{BlockRun, Head};
use partial::Partial;
use visibility::Visibility;
use workspace::with_workspace;

/// Parts of queries that each thread should have to choose from, for balance.
const PARTS_PER_THREAD: usize = 4;
/// Of a thread's share of the packed blocks, the largest and the smallest part: threads begin with large ones, for few
/// starts, and end with small ones, so that none waits long for another (guided self-scheduling: Polychronopoulos and
/// Kuck, 1987).
const LARGEST_PART: usize = 2;
const SMALLEST_PART: usize = 16;
/// Fewest packed tokens of a part: enough to make it worth its start.
const MIN_PART_TOKENS: usize = 256;
/// Queries of a part when there are many: enough to make decoding cheap, few enough for the second-level cache.
const MIN_PART_QUERIES: usize = 256;
const MAX_PART_QUERIES: usize = 2048;
/// Multiply-adds that one thread does in the time it takes to wake another.
const WORTH_WAKING: usize = 500_000;

/// What attention does beyond softmax(q·k)·v.
#[derive(Debug, Clone, Copy)]
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

impl Default for AttentionOptions<'_> {
    /// Causal, with scores as they are.
    fn default() -> Self {
        Self { scaling: 1.0, mask: None, softcap: None, sink_scores: None }
    }
}

/// Cuts a head's `n_blocks` into runs that get shorter, the same for all of `n_heads` heads, each of at least `least`
/// blocks but for the last; into one where there is one thread.
fn runs(
    n_blocks: usize,
    n_heads: usize,
    n_threads: usize,
    least: usize,
) -> impl Iterator<Item = Range<usize>> {
    let share = (n_blocks * n_heads).div_ceil(n_threads);
    let least = least.max(share / SMALLEST_PART);
    let most = if n_threads == 1 { n_blocks } else { least.max(share / LARGEST_PART) };
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = n_blocks - first;
        // Half of what is left, unless that would leave a part too small.
        let len = if n_threads == 1 || left < 2 * least { left } else { (left / 2).clamp(least, most) };
        first += len;
        (len > 0).then_some(first - len..first)
    })
}

/// What one task does for one head.
enum Part {
    /// All queries over sinks and tail.
    Exact,
    /// All queries over some packed blocks.
    Blocks(BlockRun),
    /// Some queries over all tokens.
    Dense(Range<usize>),
}

impl<E: Element> LayerCache<E> {
    /// Whether [`LayerCache::attend`] can serve: both sides coded in blocks, vectors of a multiple of eight components.
    #[must_use]
    pub fn can_attend(&self) -> bool {
        self.stream_sets()
            .is_some_and(|(k, v)| k.head_dim().is_multiple_of(8) && v.head_dim().is_multiple_of(8))
    }

    /// Attention of `queries` `[batch, query heads, n_queries, key_dim]` over all tokens, the newest included, on at
    /// most `n_threads` threads.
    ///
    /// `out` is `[batch, n_queries, query heads, value_dim]`. Query head h reads KV head h / (query heads / KV heads).
    ///
    /// # Errors
    /// Shapes that do not fit, a layer for which [`LayerCache::can_attend`] is false, no memory.
    pub fn attend(
        &self,
        queries: TensorView<'_, E>,
        options: AttentionOptions<'_>,
        out: &mut [E],
        n_threads: usize,
    ) -> Result<()> {
        let [batch, query_heads, n_queries, dim] = queries.shape();
        let (Some((keys, values)), true) = (self.stream_sets(), self.can_attend()) else {
            return Err(CacheError::NotFused);
        };
        self.check_queries(&queries, keys.head_dim(), &options, out.len(), values.head_dim())?;
        if out.is_empty() {
            return Ok(());
        }
        let work = batch * query_heads * n_queries * self.n_tokens() * (dim + values.head_dim());
        let n_threads = if work < WORTH_WAKING { 1 } else { n_threads.max(1) };
        self.attend_on(n_threads, &queries, options, out, (keys, values))
    }

    /// The parts of one head's work, `n` queries, when `n_heads` heads are shared out to `n_threads` threads.
    fn parts(&self, block_len: usize, n: usize, n_heads: usize, n_threads: usize) -> Vec<Part> {
        if n >= dense::MIN_QUERIES {
            let wanted = (n * n_heads).div_ceil(PARTS_PER_THREAD * n_threads);
            let len = wanted.clamp(MIN_PART_QUERIES, MAX_PART_QUERIES);
            // Equal parts, none a small rest.
            let len = n.div_ceil(n.div_ceil(len));
            return (0..n).step_by(len).map(|first| Part::Dense(first..n.min(first + len))).collect();
        }
        let n_blocks = self.sides(0).0.n_blocks();
        let runs = runs(n_blocks, n_heads, n_threads, MIN_PART_TOKENS.div_ceil(block_len));
        runs.map(|run| Part::Blocks(BlockRun::new(run))).chain([Part::Exact]).collect()
    }

    fn attend_on(
        &self,
        n_threads: usize,
        queries: &TensorView<'_, E>,
        options: AttentionOptions<'_>,
        out: &mut [E],
        (keys, values): (&StreamSet, &StreamSet),
    ) -> Result<()> {
        let [batch, query_heads, n_queries, dim] = queries.shape();
        let (n_heads, n_tokens, value_dim) = (self.n_heads(), self.n_tokens(), values.head_dim());
        let group = query_heads / n_heads;
        // `[batch, query heads, n_queries, dim]`: the queries of one KV head lie together.
        let mut wide = memory::room(batch * query_heads * n_queries * dim, "queries")?;
        for row in 0..batch {
            for query_head in 0..query_heads {
                for query in 0..n_queries {
                    let vector = queries.token(row, query_head, query);
                    wide.extend(vector.iter().map(|v| v.to_f32() * options.scaling));
                }
            }
        }
        let heads: Vec<Head<'_, E>> = wide
            .chunks_exact(group * n_queries * dim)
            .enumerate()
            .map(|(at, queries)| {
                let (row, head) = (at / n_heads, at % n_heads);
                let per_row = n_queries * n_tokens;
                let mask =
                    options.mask.map(|m| if m.len() == per_row { m } else { &m[row * per_row..][..per_row] });
                let (key, value) = self.sides(row);
                let visibility = Visibility { mask, n_queries, n_tokens };
                Head {
                    key,
                    value,
                    keys,
                    values,
                    head,
                    queries,
                    prepared: OnceLock::new(),
                    visibility,
                    options,
                }
            })
            .collect();
        let parts = self.parts(keys.block_len(), group * n_queries, heads.len(), n_threads);
        let mut partials: Vec<OnceLock<Result<Partial>>> =
            (0..heads.len() * parts.len()).map(|_| OnceLock::new()).collect();
        for_each_task(n_threads, partials.len(), &|task| {
            // Large parts of all heads come first.
            let head = &heads[task % heads.len()];
            let partial = with_workspace(|workspace| match &parts[task / heads.len()] {
                Part::Exact => head.exact(workspace),
                Part::Blocks(run) => head.blocks(run, workspace),
                Part::Dense(rows) => head.dense(rows.clone(), workspace),
            });
            partials[task].get_or_init(|| partial);
        });

        for (at, head) in heads.iter().enumerate() {
            let (row, kv_head) = (at / n_heads, at % n_heads);
            let values = head.value_stream();
            // Parts of the tokens are joined; parts of the queries follow one another.
            let mut joined: Vec<(usize, Partial)> = Vec::new();
            for (part, of_heads) in parts.iter().zip(partials.chunks_exact_mut(heads.len())) {
                let partial = of_heads[at].take().expect("every task has run")?;
                match (part, joined.first_mut()) {
                    (Part::Dense(rows), _) => joined.push((rows.start, partial)),
                    (_, Some((_, total))) => total.merge(values, &partial),
                    (_, None) => joined.push((0, partial)),
                }
            }
            for (first, mut total) in joined {
                if let Some(scores) = options.sink_scores {
                    for i in 0..total.max.len() {
                        total.add_sink(i, scores[kv_head * group + (first + i) / n_queries]);
                    }
                }
                for (i, vector) in total.finish(values)?.chunks_exact(value_dim).enumerate() {
                    let (member, query) = ((first + i) / n_queries, (first + i) % n_queries);
                    let to = ((row * n_queries + query) * query_heads + kv_head * group + member) * value_dim;
                    for (o, v) in out[to..to + value_dim].iter_mut().zip(vector) {
                        *o = E::from_f32(*v);
                    }
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

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_cover_all_blocks_and_get_shorter() {
        for (n_heads, n_threads) in [(1, 1), (2, 2), (8, 2), (2, 16), (3, 5)] {
            for n_blocks in [0, 1, 7, 8, 31, 256, 2048] {
                let runs: Vec<_> = runs(n_blocks, n_heads, n_threads, 4).collect();
                assert_eq!(
                    runs.iter().cloned().flatten().collect::<Vec<_>>(),
                    (0..n_blocks).collect::<Vec<_>>()
                );
                let whole = &runs[..runs.len().saturating_sub(1)];
                assert!(whole.windows(2).all(|pair| pair[0].len() >= pair[1].len()), "{runs:?}");
                assert!(whole.iter().all(|run| run.len() >= 4), "{runs:?}");
                if n_threads == 1 {
                    assert!(runs.len() <= 1, "no thread to share with: {runs:?}");
                } else if let Some(last) = runs.last().filter(|_| n_blocks * n_heads > 64 * n_threads) {
                    let share = n_blocks * n_heads / n_threads;
                    assert!(last.len() <= share / 4, "the end is shared out in small parts: {runs:?}");
                }
            }
        }
    }
}
