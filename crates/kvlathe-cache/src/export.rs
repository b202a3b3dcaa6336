//! A layer's contents as values: packed blocks by name, exact tokens beside them; out of one layer and into another.
//!
//! ```
//! use kvlathe_cache::{Coding, LayerCache, Policy, Side, Tensor};
//!
//! let mut layer = LayerCache::new(Coding::Exact, Coding::Exact, Policy::default(), 1, 2, (8, 8))?;
//! let x = Tensor::from_fn([1, 2, 40, 8], || 0.5f32);
//! layer.append(x.view(), x.view())?;
//!
//! let (keys, values) = (layer.export_side(Side::Key)?, layer.export_side(Side::Value)?);
//! let mut other = LayerCache::new(Coding::Exact, Coding::Exact, Policy::default(), 1, 2, (8, 8))?;
//! other.import(keys.as_parts(), values.as_parts())?;
//! assert_eq!(other.n_tokens(), 40);
//! # Ok::<(), kvlathe_cache::CacheError>(())
//! ```

use std::ops::Range;

use bytes::Bytes;
use kvlathe_codec::{Element, Side, StreamId, memory};

use crate::block::PackedBlock;
use crate::coding::Coding;
use crate::error::{BlockMismatch, CacheError, Result};
use crate::layer::{LayerCache, Row};
use crate::side::SideRow;
use crate::view::{Tensor, TensorView};

/// No sequence is that long; sums of positions and sizes stay numbers.
const MAX_POSITION: usize = 1 << 48;

/// A packed block as a value: `block_len` tokens of one row, all KV heads of one side. A clone shares the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Which codec packed it.
    pub id: StreamId,
    /// Position of its first slot, a multiple of the block's length.
    pub first_position: usize,
    /// What [`StreamSet::block_bytes`](kvlathe_codec::StreamSet::block_bytes) says so many of; of any owner.
    pub bytes: Bytes,
}

/// Where a side of a layer keeps its tokens, in all rows alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// Of the first token that is held: sinks begin there.
    pub first: usize,
    /// Of the first token in a block; sinks end there. Slots before it in its block are placeholders.
    pub coded_at: usize,
    /// Of the first token behind the blocks, where the exact tail begins.
    pub tail_at: usize,
    /// Behind the last token.
    pub end: usize,
}

/// One side of a layer, for [`LayerCache::import`].
#[derive(Debug, Clone, Copy)]
pub struct SideParts<'a, E> {
    /// Position of the first token.
    pub first: usize,
    /// Exact tokens from there on, `[batch, heads, n, head_dim]`.
    pub sinks: TensorView<'a, E>,
    /// For each row its blocks, oldest first.
    pub blocks: &'a [Vec<Block>],
    /// Exact tokens behind the blocks, `[batch, heads, n, head_dim]`.
    pub tail: TensorView<'a, E>,
}

/// One side of a layer as values of their own: what [`LayerCache::export_side`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportedSide<E> {
    /// Position of the first token.
    pub first: usize,
    /// Exact tokens from there on, `[batch, heads, n, head_dim]`.
    pub sinks: Tensor<E>,
    /// For each row its blocks, oldest first; they share their bytes with the layer.
    pub blocks: Vec<Vec<Block>>,
    /// Exact tokens behind the blocks, `[batch, heads, n, head_dim]`.
    pub tail: Tensor<E>,
}

impl<E: Element> ExportedSide<E> {
    /// What [`LayerCache::import`] takes.
    #[must_use]
    pub fn as_parts(&self) -> SideParts<'_, E> {
        let Self { first, sinks, blocks, tail } = self;
        SideParts { first: *first, sinks: sinks.view(), blocks, tail: tail.view() }
    }
}

impl<E: Element> LayerCache<E> {
    fn coding(&self, side: Side) -> &Coding {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    /// Where a side keeps its tokens.
    #[must_use]
    pub fn positions(&self, side: Side) -> Positions {
        let row = self.rows[0].side(side);
        let (first, coded_at, tail_at) = (row.first(), row.coded_at(), row.tail_at());
        Positions { first, coded_at, tail_at, end: self.n_tokens }
    }

    /// The packed blocks of one side of a row, oldest first. Nothing is copied: bytes are shared with the layer. What is
    /// exact, [`LayerCache::read`] gives, by [`LayerCache::positions`].
    ///
    /// # Errors
    /// A row that does not exist, a codec without a name (see [`StreamSet::with_id`](kvlathe_codec::StreamSet::with_id)),
    /// no memory for the list.
    pub fn export(&self, row: usize, side: Side) -> Result<Vec<Block>> {
        let Some(held) = self.rows.get(row) else {
            return Err(CacheError::Row { given: row, rows: self.batch() });
        };
        let Some(set) = self.coding(side).stream_set() else { return Ok(Vec::new()) };
        let id = set.id().ok_or(CacheError::Unnamed)?;
        let held = held.side(side);
        let mut blocks = memory::room(held.blocks().len(), "a list of blocks")?;
        for (at, block) in held.blocks().iter().enumerate() {
            let first_position = held.blocks_at() + at * set.block_len();
            blocks.push(Block { id, first_position, bytes: block.shared(set) });
        }
        Ok(blocks)
    }

    /// All of one side: its blocks, which share their bytes with the layer, and copies of what is exact.
    ///
    /// # Errors
    /// A codec without a name, as in [`LayerCache::export`]; no memory.
    pub fn export_side(&self, side: Side) -> Result<ExportedSide<E>> {
        let Positions { first, coded_at, tail_at, end } = self.positions(side);
        let mut blocks = memory::room(self.batch(), "a list of blocks")?;
        for row in 0..self.batch() {
            blocks.push(self.export(row, side)?);
        }
        let exact = |tokens: Range<usize>| {
            let shape = [self.batch(), self.n_heads(), tokens.len(), self.head_dim(side)];
            let mut copy = Tensor::zeros(shape, "exact tokens")?;
            self.read(side, tokens, copy.data_mut(), shape[2], 1)?;
            Ok::<_, CacheError>(copy)
        };
        Ok(ExportedSide { first, sinks: exact(first..coded_at)?, blocks, tail: exact(tail_at..end)? })
    }

    /// Fills an empty layer with what another one has exported. Blocks are attended to where their bytes lie; sinks and
    /// tail are copied. The layer then goes on as the other one would have.
    ///
    /// # Errors
    /// A layer that holds tokens; blocks of another preset, layer or side, out of order, with gaps, or of another length;
    /// parts that do not fit each other or the layer's policy, such as those of a layer that was cropped to where its
    /// window shows tokens that it has forgotten; NaN or infinity in exact tokens of a coded side; no memory. The layer
    /// stays empty then.
    pub fn import(&mut self, keys: SideParts<'_, E>, values: SideParts<'_, E>) -> Result<()> {
        if self.n_tokens > 0 {
            return Err(CacheError::NotEmpty { n_tokens: self.n_tokens });
        }
        let ends = [(Side::Key, &keys), (Side::Value, &values)].map(|(side, parts)| self.check(side, parts));
        let [key_end, value_end] = [ends[0].clone()?, ends[1].clone()?];
        if key_end != value_end {
            let (given, expected) = (value_end, key_end);
            return Err(CacheError::Shape { what: "the number of value tokens", given, expected });
        }
        let first_seen = self.policy.first_seen(key_end);
        if let Some(wanted) = [keys.first, values.first].into_iter().find(|&first| first > first_seen) {
            return Err(CacheError::Forgotten { wanted: first_seen, first: wanted });
        }
        let mut rows = memory::room(self.batch(), "rows")?;
        for row in 0..self.batch() {
            rows.push(Row {
                key: self.imported(Side::Key, &keys, row)?,
                value: self.imported(Side::Value, &values, row)?,
            });
        }
        self.rows = rows;
        self.n_tokens = key_end;
        Ok(())
    }

    /// Position behind the last token of a side's parts, if they fit.
    fn check(&self, side: Side, parts: &SideParts<'_, E>) -> Result<usize> {
        let coding = self.coding(side);
        for view in [&parts.sinks, &parts.tail] {
            self.check_view(view, side)?;
            coding.check_values(view, side.plural())?;
        }
        let shape = |what, given, expected| Err(CacheError::Shape { what, given, expected });
        if parts.blocks.len() != self.batch() {
            return shape("the number of rows with blocks", parts.blocks.len(), self.batch());
        }
        let n_blocks = parts.blocks[0].len();
        if let Some(other) = parts.blocks.iter().find(|blocks| blocks.len() != n_blocks) {
            return shape("the number of a row's blocks", other.len(), n_blocks);
        }
        if parts.first > MAX_POSITION {
            return shape("the position of the first token", parts.first, MAX_POSITION);
        }
        let (n_sinks, n_tail) = (parts.sinks.n_tokens(), parts.tail.n_tokens());
        let coded_at = parts.first + n_sinks;
        let Some(set) = coding.stream_set() else {
            // All of an exact side is its tail.
            let n_coded = n_sinks + n_blocks;
            return if n_coded == 0 {
                Ok(coded_at + n_tail)
            } else {
                shape("sinks and blocks of an exact side", n_coded, 0)
            };
        };
        if coded_at > self.policy.n_sinks && n_sinks > 0 {
            return shape("the end of the sinks", coded_at, self.policy.n_sinks);
        }
        if coded_at < self.policy.n_sinks && n_blocks + n_tail > 0 {
            return shape("the end of the sinks", coded_at, self.policy.n_sinks);
        }
        let id = set.id().ok_or(CacheError::Unnamed)?;
        let blocks_at = coded_at / set.block_len() * set.block_len();
        for (row, blocks) in parts.blocks.iter().enumerate() {
            for (index, block) in blocks.iter().enumerate() {
                let given = (block.id, block.first_position, block.bytes.len());
                let expected = (id, blocks_at + index * set.block_len(), set.block_bytes());
                if let Some(mismatch) = BlockMismatch::of(given, expected) {
                    return Err(CacheError::WrongBlock { row, index, mismatch });
                }
            }
        }
        let coded_end = if n_blocks == 0 { coded_at } else { blocks_at + n_blocks * set.block_len() };
        Ok(coded_end + n_tail)
    }

    /// One row of a side's parts, which fit.
    fn imported(&self, side: Side, parts: &SideParts<'_, E>, row: usize) -> Result<SideRow<E>> {
        let [_, heads, _, dim] = parts.tail.shape();
        let mut new = SideRow::new(self.coding(side), heads, dim);
        let of_row = &parts.blocks[row];
        let mut blocks = memory::room(of_row.len(), "a list of blocks")?;
        blocks.extend(of_row.iter().map(|block| PackedBlock::imported(block.bytes.clone())));
        new.fill(parts.first, (&parts.sinks, blocks, &parts.tail), row)?;
        Ok(new)
    }
}
