//! One KV head's attention over a part of the tokens: packed blocks, or the exact ones.

use std::ops::Range;

use kvlathe_codec::{
    BLOCK_LENS, Element, MAX_TOKENS_AT_ONCE, Queries, RotationWalk, StreamSet, StreamTables, best_isa,
    product, row_products, weigh,
};

use super::AttentionOptions;
use super::partial::Partial;
use super::visibility::Visibility;
use crate::error::Result;
use crate::side::SideRow;
use crate::workspace::{BUFFERS, TileSums, Workspace};

/// Exact tokens that are multiplied together: their keys and values stay in the second-level cache.
const TILE_TOKENS: usize = 256;

/// Packed blocks that are multiplied together, at most: the shortest are the most.
const MAX_BLOCKS: usize = MAX_TOKENS_AT_ONCE / BLOCK_LENS[0];

/// A tile's place among the tokens.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Position of the first column.
    pub(super) first: usize,
    /// Columns in front that stand for no token: placeholders of a block.
    pub(super) n_placeholders: usize,
    /// Columns to the end of the last token.
    pub(super) n_slots: usize,
    /// Columns of its scores: `n_slots` and padding.
    pub(super) width: usize,
}

impl Place {
    /// Columns of tokens.
    pub(super) fn held(&self) -> Range<usize> {
        self.n_placeholders..self.n_slots
    }
}

/// Packed blocks that follow one another, the same of all heads.
#[derive(Default)]
pub(super) struct BlockRun {
    pub(super) blocks: Range<usize>,
    /// At the first block: its sines take as long as scoring a block.
    pub(super) walk: Option<RotationWalk>,
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

    /// Packed blocks, a tile after another. `queries` are the head's, made ready for packed keys.
    pub(super) fn blocks(
        &self,
        run: &BlockRun,
        queries: &Queries,
        partial: &mut Partial,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Workspace { scratch, scores, sums: TileSums { rescale, .. }, walk, .. } = workspace;
        let (n, block_len, isa) = (self.n(), self.keys.block_len(), best_isa());
        let (keys, values) = (self.key_stream(), self.value_stream());
        partial.clear(values.head_dim(), n)?;
        let (sums, max, sum) = partial.packed(values)?;
        rescale.resize(n, BUFFERS)?;
        walk.clone_from(&run.walk);

        let (key_range, value_range) = (self.keys.head_range(self.head), self.values.head_range(self.head));
        let blocks_of_tile = MAX_TOKENS_AT_ONCE / block_len;
        let (mut key_blocks, mut value_blocks) = ([&[][..]; MAX_BLOCKS], [&[][..]; MAX_BLOCKS]);
        for start in run.blocks.clone().step_by(blocks_of_tile) {
            let tile = start..run.blocks.end.min(start + blocks_of_tile);
            let (key_blocks, value_blocks) = (&mut key_blocks[..tile.len()], &mut value_blocks[..tile.len()]);
            for (i, at) in tile.enumerate() {
                key_blocks[i] = &self.key.blocks()[at].packed()[key_range.clone()];
                value_blocks[i] = &self.value.blocks()[at].packed()[value_range.clone()];
            }
            let first = self.key.blocks_at() + start * block_len;
            let held = self.key.coded_at().saturating_sub(first)..key_blocks.len() * block_len;
            let n_tokens = key_blocks.len() * block_len;
            scores.resize(n * n_tokens, BUFFERS)?;
            keys.score_blocks(isa, key_blocks, walk.as_mut(), queries, value_blocks, scores, scratch)?;
            self.cap(scores);
            self.visibility.hide(scores, (n_tokens, held), first, 0..n);
            weigh(isa, scores, n_tokens, max, sum, rescale);
            for (query, factor) in rescale.iter().enumerate().filter(|(_, factor)| **factor != 1.0) {
                sums.scale(query, *factor);
            }
            values.accumulate_blocks(isa, value_blocks, scores, sums, scratch)?;
        }
        Ok(())
    }

    /// Sinks and tail, each with the place of its first token.
    pub(super) fn exact_runs(&self) -> [(&[E], &[E], usize); 2] {
        [
            (self.key.sinks(self.head), self.value.sinks(self.head), self.key.first()),
            (self.key.tail(self.head), self.value.tail(self.head), self.key.tail_at()),
        ]
    }

    /// Sinks and tail.
    pub(super) fn exact(&self, partial: &mut Partial, workspace: &mut Workspace) -> Result<()> {
        let (key_dim, value_dim) = (self.keys.head_dim(), self.values.head_dim());
        partial.clear(value_dim, self.n())?;
        for (keys, values, mut first) in self.exact_runs() {
            for (keys, values) in
                keys.chunks(TILE_TOKENS * key_dim).zip(values.chunks(TILE_TOKENS * value_dim))
            {
                self.exact_tile(keys, values, first, partial, workspace)?;
                first += TILE_TOKENS;
            }
        }
        Ok(())
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
        let place = Place { first, n_placeholders: 0, n_slots: n_tokens, width: n_tokens };
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
        self.visibility.hide(scores, (place.width, place.held()), place.first, rows);
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
