//! One side (keys or values) of one batch row.
//!
//! Blocks begin at multiples of their length, wherever the coded tokens begin: block n of a sequence holds the positions
//! n·B to n·B + B − 1. Slots of the first block whose tokens are sinks, or have left a window before it was coded, are
//! *placeholders*: zero vectors that nobody reads or attends to.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use kvlathe_codec::{Element, Scratch, StreamSet, memory};

use crate::block::{Decoding, Encoding, PackedBlock};
use crate::coding::Coding;
use crate::error::Result;
use crate::exact::ExactRun;
use crate::view::TensorView;

/// What [`SideRow::cut`] found: the block that is cut, as exact tokens without those that go.
pub(crate) struct Cut<E>(Option<ExactRun<E>>);

/// Tokens that no query sees any more.
pub(crate) struct Stale {
    n_sinks: usize,
    n_blocks: usize,
    /// None while older ones are still coded.
    n_tail: usize,
}

impl Stale {
    /// Whether nothing is to be dropped.
    pub(crate) const fn is_empty(&self) -> bool {
        self.n_sinks == 0 && self.n_blocks == 0 && self.n_tail == 0
    }
}

/// Exact tokens that leave a window together at least.
const FORGOTTEN_TOGETHER: usize = 16;

/// Tokens of one row and side, oldest first: sinks, coded, tail. A side that is not coded keeps all in its tail.
pub(crate) struct SideRow<E> {
    /// Position of the first token that is held.
    first: usize,
    sinks: ExactRun<E>,
    set: Option<Arc<StreamSet>>,
    blocks: Vec<PackedBlock>,
    tail: ExactRun<E>,
}

impl<E: Element> SideRow<E> {
    pub(crate) fn new(coding: &Coding, n_heads: usize, head_dim: usize) -> Self {
        let [sinks, tail] = [(), ()].map(|()| ExactRun::new(n_heads, head_dim));
        Self { first: 0, sinks, set: coding.stream_set().cloned(), blocks: Vec::new(), tail }
    }

    /// Fills an empty side: sinks from position `first` on, blocks, and the tail behind them, of one row of tensors.
    pub(crate) fn fill(
        &mut self,
        first: usize,
        (sinks, blocks, tail): (&TensorView<'_, E>, Vec<PackedBlock>, &TensorView<'_, E>),
        row: usize,
    ) -> Result<()> {
        for (run, view) in [(&mut self.sinks, sinks), (&mut self.tail, tail)] {
            run.reserve(view.n_tokens())?;
            run.append(view, row, 0..view.n_tokens());
        }
        self.first = first;
        self.blocks = blocks;
        Ok(())
    }

    /// A copy that shares the packed blocks.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            first: self.first,
            sinks: self.sinks.try_clone()?,
            set: self.set.clone(),
            blocks: memory::copied(&self.blocks, "a list of blocks")?,
            tail: self.tail.try_clone()?,
        })
    }

    /// Tokens of a block; one where nothing is coded.
    fn block_len(&self) -> usize {
        self.set.as_ref().map_or(1, |set| set.block_len())
    }

    /// Tokens in the coded middle, placeholders not counted.
    pub(crate) fn n_coded(&self) -> usize {
        self.tail_at() - self.coded_at()
    }

    pub(crate) fn n_tail(&self) -> usize {
        self.tail.n_tokens()
    }

    /// Position of the first token that is held: above zero once some were forgotten.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Position of the first coded token; behind it there are no placeholders.
    pub(crate) fn coded_at(&self) -> usize {
        self.first + self.sinks.n_tokens()
    }

    /// Position of the first block's first slot.
    pub(crate) fn blocks_at(&self) -> usize {
        self.block_of(self.coded_at())
    }

    /// Position of the tail's first token.
    pub(crate) fn tail_at(&self) -> usize {
        // A block's length at least lies behind the first slot, and so the first coded token.
        let end = self.blocks_at() + self.blocks.len() * self.block_len();
        if self.blocks.is_empty() { self.coded_at() } else { end }
    }

    /// Position of the first slot of the block that has a position.
    fn block_of(&self, position: usize) -> usize {
        position / self.block_len() * self.block_len()
    }

    /// One head's sinks, `[tokens, head_dim]`.
    pub(crate) fn sinks(&self, head: usize) -> &[E] {
        self.sinks.head(head)
    }

    /// One head's tail, `[tokens, head_dim]`.
    pub(crate) fn tail(&self, head: usize) -> &[E] {
        self.tail.head(head)
    }

    /// The packed blocks, oldest first; none where the side is not coded.
    pub(crate) fn blocks(&self) -> &[PackedBlock] {
        &self.blocks
    }

    /// How many of `n_tokens` new tokens become sinks: the first `n_sinks` of the sequence do.
    fn to_sinks(&self, n_tokens: usize, n_sinks: usize) -> usize {
        if self.set.is_some() { n_sinks.saturating_sub(self.coded_at()).min(n_tokens) } else { 0 }
    }

    /// Makes room for `n_tokens` more.
    pub(crate) fn reserve(&mut self, n_tokens: usize, n_sinks: usize) -> Result<()> {
        let to_sinks = self.to_sinks(n_tokens, n_sinks);
        self.sinks.reserve(to_sinks)?;
        self.tail.reserve(n_tokens - to_sinks)
    }

    /// Gives back the room that [`SideRow::reserve`] made in vain.
    pub(crate) fn trim(&mut self) {
        self.tail.trim();
    }

    /// Appends all tokens of one row of a tensor, for which there is room.
    pub(crate) fn append(&mut self, view: &TensorView<'_, E>, row: usize, n_sinks: usize) {
        let to_sinks = self.to_sinks(view.n_tokens(), n_sinks);
        self.sinks.append(view, row, 0..to_sinks);
        self.tail.append(view, row, to_sinks..view.n_tokens());
    }

    /// Blocks that end before the last `n_tail` tokens and are not coded yet, once stale tokens are gone.
    pub(crate) fn n_due(&self, n_tail: usize, stale: &Stale) -> usize {
        if self.set.is_none() {
            return 0;
        }
        let end = (self.tail_at() + self.n_tail()).saturating_sub(n_tail);
        let next = self.block_of(self.tail_at() + stale.n_tail);
        self.block_of(end).saturating_sub(next) / self.block_len()
    }

    /// Makes room for so many blocks, and gives room for them until they are coded.
    pub(crate) fn reserve_blocks(&mut self, n_blocks: usize) -> Result<Vec<Option<PackedBlock>>> {
        memory::reserve(&mut self.blocks, n_blocks, "a list of blocks")?;
        Ok(memory::filled(n_blocks, None, "a list of blocks")?)
    }

    /// Lists what codes the oldest tokens of the tail that are not stale into `new`.
    pub(crate) fn encodings<'a>(
        &'a self,
        stale: &Stale,
        new: &'a mut [Option<PackedBlock>],
        encodings: &mut Vec<Encoding<'a, E>>,
    ) -> Result<()> {
        let Some(set) = &self.set else { return Ok(()) };
        memory::reserve(encodings, new.len(), "a list of tasks")?;
        let from = self.tail_at() + stale.n_tail;
        let positions = (self.block_of(from)..).step_by(set.block_len());
        encodings.extend(new.iter_mut().zip(positions).map(|(block, position)| Encoding {
            set,
            tokens: &self.tail,
            first: position.max(from) - self.tail_at(),
            n_placeholders: from.saturating_sub(position),
            position,
            block,
        }));
        Ok(())
    }

    /// Takes what has been coded out of the tail.
    pub(crate) fn commit(&mut self, new: Vec<Option<PackedBlock>>) {
        if !new.is_empty() {
            let end = self.block_of(self.tail_at()) + new.len() * self.block_len();
            self.tail.drop_front(end - self.tail_at());
            self.blocks.extend(new.into_iter().flatten());
        }
    }

    /// Writes head `head` of some tokens to the front of `out`, `[tokens, head_dim]`: exact ones at once, of coded ones
    /// it lists the blocks.
    pub(crate) fn read_head<'a>(
        &'a self,
        head: usize,
        tokens: Range<usize>,
        out: &'a mut [E],
        decodings: &mut Vec<Decoding<'a, E>>,
    ) -> Result<()> {
        let (coded_at, tail_at) = (self.coded_at(), self.tail_at());
        let mut out = self.sinks.read(head, part(&tokens, self.first..coded_at), out);
        let coded = tokens.start.max(coded_at)..tokens.end.min(tail_at);
        if let (Some(set), false) = (&self.set, coded.is_empty()) {
            let (len, blocks_at) = (set.block_len(), self.blocks_at());
            let touched = (coded.start - blocks_at) / len..(coded.end - blocks_at).div_ceil(len);
            memory::reserve(decodings, touched.len(), "a list of tasks")?;
            for at in touched {
                let position = blocks_at + at * len;
                let within = part(&coded, position..position + len);
                let (piece, rest) = out.split_at_mut(within.len() * set.head_dim());
                out = rest;
                let block = &self.blocks[at];
                decodings.push(Decoding { set, block, head, position, within, out: piece });
            }
        }
        self.tail.read(head, part(&tokens, tail_at..tail_at + self.n_tail()), out);
        Ok(())
    }

    /// Decodes the block that removing the newest `n_tokens` would cut, for [`SideRow::crop`]. Changes nothing.
    pub(crate) fn cut(&self, n_tokens: usize) -> Result<Cut<E>> {
        let Some(set) = &self.set else { return Ok(Cut(None)) };
        let (end, len, d) = (self.end_of_coded(n_tokens), set.block_len(), set.head_dim());
        let position = self.block_of(end);
        if end == self.tail_at() || end == position || end == self.coded_at() {
            return Ok(Cut(None));
        }
        let block = &self.blocks[(position - self.blocks_at()) / len];
        let kept = position.max(self.coded_at()) - position..end - position;
        let mut scratch = Scratch::default();
        let mut heads = memory::room(set.streams().len(), "a decoded block")?;
        for head in 0..set.streams().len() {
            let mut out = memory::filled(len * d, E::default(), "a decoded block")?;
            block.decode(set, head, position, &mut out, &mut scratch)?;
            out.truncate(kept.end * d);
            out.drain(..kept.start * d);
            heads.push(out);
        }
        Ok(Cut(Some(ExactRun::from_decoded(heads, d))))
    }

    /// Position behind the last coded token that removing the newest `n_tokens` would leave.
    fn end_of_coded(&self, n_tokens: usize) -> usize {
        self.tail_at() - n_tokens.saturating_sub(self.n_tail()).min(self.n_coded())
    }

    /// Removes the newest `n_tokens`. A block that is cut goes back to the tail as decoded, without its lost tokens.
    pub(crate) fn crop(&mut self, n_tokens: usize, cut: Cut<E>) {
        let from_sinks = n_tokens.saturating_sub(self.n_tail() + self.n_coded());
        let end = self.end_of_coded(n_tokens);
        self.tail.truncate(self.n_tail() - n_tokens.min(self.n_tail()));
        if let Cut(Some(rest)) = cut {
            self.tail = rest;
        }
        let n_whole = self.block_of(end).saturating_sub(self.blocks_at()) / self.block_len();
        self.blocks.truncate(n_whole);
        self.sinks.truncate(self.sinks.n_tokens() - from_sinks);
    }

    /// What is before `position`, oldest first; coded tokens in whole blocks, others some at a time.
    pub(crate) fn stale(&self, position: usize) -> Stale {
        let n_sinks = position.saturating_sub(self.first).min(self.sinks.n_tokens());
        let n_blocks = position.saturating_sub(self.blocks_at()) / self.block_len();
        let n_blocks = n_blocks.min(self.blocks.len());
        let n_tail = position.saturating_sub(self.tail_at()).min(self.n_tail());
        let n_tail = if n_blocks == self.blocks.len() { dropped_together(n_tail, self.n_tail()) } else { 0 };
        Stale { n_sinks, n_blocks, n_tail }
    }

    /// Drops what [`SideRow::stale`] has found.
    pub(crate) fn forget(&mut self, stale: &Stale) {
        let Stale { n_sinks, n_blocks, n_tail } = *stale;
        if n_blocks > 0 {
            // All sinks are before the first block's end.
            let left_at = self.blocks_at() + n_blocks * self.block_len();
            self.sinks.drop_front(self.sinks.n_tokens());
            self.blocks.drain(..n_blocks);
            self.first = left_at;
        } else if n_sinks > 0 {
            self.sinks.drop_front(n_sinks);
            self.first += n_sinks;
        }
        if n_tail > 0 {
            self.tail.drop_front(n_tail);
            self.first += n_tail;
        }
    }

    /// Bytes of sinks and tail.
    pub(crate) fn exact_bytes(&self) -> usize {
        self.sinks.bytes() + self.tail.bytes()
    }

    /// Bytes of the packed blocks, and those of them that are somebody else's; blocks whose address is in `seen` are
    /// shared and were counted before.
    pub(crate) fn coded_bytes(&self, seen: &mut HashSet<usize>) -> (usize, usize) {
        let new = self.blocks.iter().filter(|block| seen.insert(block.packed().as_ptr().addr()));
        new.fold((0, 0), |(all, foreign), block| {
            let n_bytes = block.n_bytes();
            (all + n_bytes, if block.is_own() { foreign } else { foreign + n_bytes })
        })
    }
}

/// How many of the `n` oldest of `held` tokens are dropped, where those that are left move up: none moves if all go.
fn dropped_together(n: usize, held: usize) -> usize {
    if n == held { n } else { n / FORGOTTEN_TOGETHER * FORGOTTEN_TOGETHER }
}

/// What `tokens` and a run have in common, counted from the run's first token.
fn part(tokens: &Range<usize>, run: Range<usize>) -> Range<usize> {
    let (start, end) = (tokens.start.max(run.start), tokens.end.min(run.end));
    if start < end { start - run.start..end - run.start } else { 0..0 }
}
