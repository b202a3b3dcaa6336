//! One KV head's attention over a part of the tokens: packed blocks, or the exact ones.

use std::ops::Range;
use std::sync::OnceLock;

use kvlathe_codec::{
    CoefficientSums, Element, MAX_TOKENS_AT_ONCE, Queries, RotationWalk, StreamSet, StreamTables, best_isa,
    product, row_products, weigh,
};

use super::AttentionOptions;
use super::partial::Partial;
use super::visibility::Visibility;
use super::workspace::{BUFFERS, TileSums, Workspace};
use crate::error::Result;
use crate::side::SideRow;

/// Exact tokens that are multiplied together: their keys and values stay in the second-level cache.
const TILE_TOKENS: usize = 256;

/// A tile's place among the tokens.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) first: usize,
    pub(super) n_tokens: usize,
    /// Columns of its scores: `n_tokens` and padding.
    pub(super) width: usize,
}

/// Packed blocks that follow one another, the same of all heads.
pub(super) struct BlockRun {
    blocks: Range<usize>,
    /// At the first block, left by whichever head comes first: its sines take as long as scoring a block.
    walk: OnceLock<Option<RotationWalk>>,
}

impl BlockRun {
    pub(super) fn new(blocks: Range<usize>) -> Self {
        Self { blocks, walk: OnceLock::new() }
    }
}

/// What another thread has left, or makes it. Two may make it at once: a thread that waited for the other would go to
/// sleep, and waking takes longer.
fn shared<T>(slot: &OnceLock<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if slot.get().is_none() {
        let _ = slot.set(make()?);
    }
    Ok(slot.get().expect("set above, by this thread or another"))
}

/// The work of one KV head of one sequence.
pub(super) struct Head<'a, E> {
    pub(super) key: &'a SideRow<E>,
    pub(super) value: &'a SideRow<E>,
    pub(super) keys: &'a StreamSet,
    pub(super) values: &'a StreamSet,
    pub(super) head: usize,
    /// `[n, key_dim]` times the attention's scaling, `n` = group · queries, a query head's queries one after another.
    pub(super) queries: &'a [f32],
    /// The same made ready for packed keys, left by whoever needs it first.
    pub(super) prepared: OnceLock<Queries>,
    pub(super) visibility: Visibility<'a>,
    pub(super) options: AttentionOptions<'a>,
}

impl<E: Element> Head<'_, E> {
    pub(super) fn n(&self) -> usize {
        self.queries.len() / self.keys.head_dim()
    }

    pub(super) fn key_stream(&self) -> &StreamTables {
        &self.keys.streams()[self.head]
    }

    pub(super) fn value_stream(&self) -> &StreamTables {
        &self.values.streams()[self.head]
    }

    fn cap(&self, scores: &mut [f32]) {
        if let Some(cap) = self.options.softcap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
    }

    /// Packed blocks, a tile after another.
    pub(super) fn blocks(&self, run: &BlockRun, workspace: &mut Workspace) -> Result<Partial> {
        let Workspace { scratch, scores, sums: TileSums { rescale, .. }, .. } = workspace;
        let (n, block_len, isa) = (self.n(), self.keys.block_len(), best_isa());
        let (keys, values) = (self.key_stream(), self.value_stream());
        let mut partial = Partial::new(values.head_dim(), n)?;
        let mut sums = CoefficientSums::new(values, n);
        rescale.resize(n, BUFFERS)?;
        let queries = shared(&self.prepared, || Ok(Queries::new(keys, self.queries)?))?;

        let [key_blocks, value_blocks] =
            [(self.key, self.keys), (self.value, self.values)].map(|(row, set)| {
                let head_range = set.head_range(self.head);
                run.blocks.clone().map(|at| &row.block(at)[head_range.clone()]).collect::<Vec<&[u8]>>()
            });
        let mut first = self.key.n_sinks_held() + run.blocks.start * block_len;
        let (middle, step) = ((first + block_len / 2) as i64, block_len as i64);
        let mut walk =
            shared(&run.walk, || Ok(self.keys.rope().map(|rope| rope.walk_back(middle, step))))?.clone();
        let blocks_of_tile = MAX_TOKENS_AT_ONCE / block_len;
        for (key_blocks, value_blocks) in
            key_blocks.chunks(blocks_of_tile).zip(value_blocks.chunks(blocks_of_tile))
        {
            let n_tokens = key_blocks.len() * block_len;
            scores.resize(n * n_tokens, BUFFERS)?;
            keys.score_blocks(isa, key_blocks, walk.as_mut(), queries, value_blocks, scores, scratch)?;
            self.cap(scores);
            self.visibility.hide(scores, (n_tokens, n_tokens), first, 0..n);
            weigh(isa, scores, n_tokens, &mut partial.max, &mut partial.sum, rescale);
            for (query, factor) in rescale.iter().enumerate().filter(|(_, factor)| **factor != 1.0) {
                sums.scale(query, *factor);
            }
            values.accumulate_blocks(isa, value_blocks, scores, &mut sums, scratch)?;
            first += n_tokens;
        }
        partial.coefficients = Some(sums);
        Ok(partial)
    }

    /// Sinks and tail, each with the place of its first token.
    pub(super) fn exact_runs(&self) -> [(&[E], &[E], usize); 2] {
        let tail_at = self.key.n_sinks_held() + self.key.n_coded();
        [
            (self.key.sinks(self.head), self.value.sinks(self.head), 0),
            (self.key.tail(self.head), self.value.tail(self.head), tail_at),
        ]
    }

    /// Sinks and tail.
    pub(super) fn exact(&self, workspace: &mut Workspace) -> Result<Partial> {
        let (key_dim, value_dim) = (self.keys.head_dim(), self.values.head_dim());
        let mut partial = Partial::new(value_dim, self.n())?;
        for (keys, values, mut first) in self.exact_runs() {
            for (keys, values) in
                keys.chunks(TILE_TOKENS * key_dim).zip(values.chunks(TILE_TOKENS * value_dim))
            {
                self.exact_tile(keys, values, first, &mut partial, workspace)?;
                first += TILE_TOKENS;
            }
        }
        Ok(partial)
    }

    /// Up to [`TILE_TOKENS`] exact tokens, `[tokens, dim]`.
    fn exact_tile(
        &self,
        keys: &[E],
        values: &[E],
        first: usize,
        partial: &mut Partial,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Workspace { scores, wide, sums, .. } = workspace;
        let (n, key_dim) = (self.n(), self.keys.head_dim());
        let n_tokens = keys.len() / key_dim;
        scores.resize(n * n_tokens, BUFFERS)?;
        row_products(best_isa(), self.queries, E::widen(keys, wide)?, scores, (key_dim, n_tokens));
        let place = Place { first, n_tokens, width: n_tokens };
        self.add_tile(scores, E::widen(values, wide)?, place, (0..n, 0), partial, sums)
    }

    /// Takes a tile's scores `[rows, width]` and values `[width, value_dim]` into a partial result, in which the first of
    /// the query rows is `to`.
    pub(super) fn add_tile(
        &self,
        scores: &mut [f32],
        values: &[f32],
        place: Place,
        (rows, to): (Range<usize>, usize),
        partial: &mut Partial,
        sums: &mut TileSums,
    ) -> Result<()> {
        let (n, dim, isa) = (rows.len(), self.values.head_dim(), best_isa());
        let TileSums { rescale, added } = sums;
        rescale.resize(n, BUFFERS)?;
        added.resize(n * dim, BUFFERS)?;
        self.cap(scores);
        self.visibility.hide(scores, (place.width, place.n_tokens), place.first, rows);
        weigh(isa, scores, place.width, &mut partial.max[to..to + n], &mut partial.sum[to..to + n], rescale);
        product(isa, scores, values, added, (place.width, dim));
        let out = partial.out[to * dim..(to + n) * dim].chunks_exact_mut(dim);
        for ((out, added), factor) in out.zip(added.chunks_exact(dim)).zip(&**rescale) {
            for (o, a) in out.iter_mut().zip(added) {
                *o = *o * factor + a;
            }
        }
        Ok(())
    }
}
