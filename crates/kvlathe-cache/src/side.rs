//! One side (keys or values) of one batch row.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use kvlathe_codec::{Element, LowRank, Scratch, StreamSet, best_isa, memory};

use crate::block::Block;
use crate::coding::Coding;
use crate::error::Result;
use crate::exact::{ExactRun, trim};
use crate::pieces::{EncodePiece, ReadPiece};
use crate::view::TensorView;

/// The coded middle of a side.
enum Coded {
    Blocks(Arc<StreamSet>, Vec<Arc<Block>>),
    /// One byte string a head, `vector_bytes` a token.
    LowRank(Arc<LowRank>, Vec<Vec<u8>>),
}

impl Coded {
    fn try_clone(&self) -> Result<Self> {
        Ok(match self {
            Self::Blocks(set, blocks) => {
                Self::Blocks(Arc::clone(set), memory::copied(blocks, "a list of blocks")?)
            }
            Self::LowRank(coder, heads) => {
                let heads = heads.iter().map(|coded| memory::copied(coded, "coded tokens"));
                Self::LowRank(Arc::clone(coder), heads.collect::<std::result::Result<_, _>>()?)
            }
        })
    }
}

/// What a side codes, before it leaves the tail.
pub(crate) enum NewCoded {
    /// The side is not coded.
    Nothing,
    /// Filled in by [`EncodePiece::encode`].
    Blocks(Vec<Option<Arc<Block>>>),
    /// One byte string a head.
    LowRank(Vec<Vec<u8>>),
}

/// Tokens of one head whose low-rank coding is read in one piece.
const LOW_RANK_TOKENS: usize = 1024;

/// What [`SideRow::cut`] found: the block that is cut, as exact tokens without those that go.
pub(crate) struct Cut<E>(Option<ExactRun<E>>);

/// Tokens that no query sees any more.
pub(crate) struct Stale {
    n_sinks: usize,
    n_coded: usize,
    /// None while older ones are still coded.
    pub(crate) n_tail: usize,
}

/// Exact tokens, and those of a low-rank coding, that are dropped together at least.
const FORGOTTEN_TOGETHER: usize = 16;

/// Tokens of one row and side, oldest first: sinks, coded, tail. A side that is not coded keeps all in its tail.
pub(crate) struct SideRow<E> {
    /// Position of the first token that is held.
    first: usize,
    sinks: ExactRun<E>,
    coded: Option<Coded>,
    tail: ExactRun<E>,
}

impl<E: Element> SideRow<E> {
    pub(crate) fn new(coding: &Coding, n_heads: usize, head_dim: usize) -> Self {
        let coded = match coding {
            Coding::Exact => None,
            Coding::Blocks(set) => Some(Coded::Blocks(Arc::clone(set), Vec::new())),
            Coding::LowRank(coder) => Some(Coded::LowRank(Arc::clone(coder), vec![Vec::new(); n_heads])),
        };
        let [sinks, tail] = [(), ()].map(|()| ExactRun::new(n_heads, head_dim));
        Self { first: 0, sinks, coded, tail }
    }

    /// A copy that shares the packed blocks.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            first: self.first,
            sinks: self.sinks.try_clone()?,
            coded: self.coded.as_ref().map(Coded::try_clone).transpose()?,
            tail: self.tail.try_clone()?,
        })
    }

    /// Tokens in the coded middle.
    pub(crate) fn n_coded(&self) -> usize {
        match &self.coded {
            None => 0,
            Some(Coded::Blocks(set, blocks)) => blocks.len() * set.block_len(),
            Some(Coded::LowRank(coder, heads)) => heads[0].len() / coder.vector_bytes(),
        }
    }

    pub(crate) fn n_tail(&self) -> usize {
        self.tail.n_tokens()
    }

    pub(crate) fn is_coded(&self) -> bool {
        self.coded.is_some()
    }

    /// Position of the first token that is held: above zero once some were forgotten.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Position of the first coded token.
    pub(crate) fn coded_at(&self) -> usize {
        self.first + self.sinks.n_tokens()
    }

    /// Position of the tail's first token.
    pub(crate) fn tail_at(&self) -> usize {
        self.coded_at() + self.n_coded()
    }

    /// One head's sinks, `[tokens, head_dim]`.
    pub(crate) fn sinks(&self, head: usize) -> &[E] {
        self.sinks.head(head)
    }

    /// One head's tail, `[tokens, head_dim]`.
    pub(crate) fn tail(&self, head: usize) -> &[E] {
        self.tail.head(head)
    }

    /// Packed blocks; zero where the side is not coded in blocks.
    pub(crate) fn n_blocks(&self) -> usize {
        match &self.coded {
            Some(Coded::Blocks(_, blocks)) => blocks.len(),
            _ => 0,
        }
    }

    /// The bytes of block `at`, below [`SideRow::n_blocks`].
    pub(crate) fn block(&self, at: usize) -> &[u8] {
        match &self.coded {
            Some(Coded::Blocks(_, blocks)) => blocks[at].packed(),
            _ => &[],
        }
    }

    /// How many of `n_tokens` new tokens become sinks: the first `n_sinks` of the sequence do.
    fn to_sinks(&self, n_tokens: usize, n_sinks: usize) -> usize {
        if self.is_coded() { n_sinks.saturating_sub(self.coded_at()).min(n_tokens) } else { 0 }
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

    /// Makes room for coding the oldest `n_tokens` of the tail, a multiple of the coding's granularity.
    pub(crate) fn reserve_coded(&mut self, n_tokens: usize) -> Result<NewCoded> {
        Ok(match &mut self.coded {
            None => NewCoded::Nothing,
            Some(Coded::Blocks(set, blocks)) => {
                let n_blocks = n_tokens / set.block_len();
                memory::reserve(blocks, n_blocks, "a list of blocks")?;
                NewCoded::Blocks(memory::filled(n_blocks, None, "a list of blocks")?)
            }
            Some(Coded::LowRank(coder, heads)) => {
                let more = n_tokens * coder.vector_bytes();
                let mut new = memory::room(heads.len(), "coded tokens")?;
                for coded in heads {
                    if coded.capacity() - coded.len() < more {
                        // An eighth of headroom, as exact tokens have.
                        memory::reserve(coded, more.max(coded.len() / 8), "coded tokens")?;
                    }
                    new.push(memory::filled(more, 0, "coded tokens")?);
                }
                NewCoded::LowRank(new)
            }
        })
    }

    /// Lists what codes the tail's tokens from `skipped` on into `new`, for which [`SideRow::reserve_coded`] has made room.
    pub(crate) fn encode_pieces<'a>(
        &'a self,
        skipped: usize,
        new: &'a mut NewCoded,
        pieces: &mut Vec<EncodePiece<'a, E>>,
    ) -> Result<()> {
        let (tail_at, tokens) = (self.tail_at(), &self.tail);
        match (&self.coded, new) {
            (Some(Coded::Blocks(set, _)), NewCoded::Blocks(new)) => {
                memory::reserve(pieces, new.len(), "a list of tasks")?;
                let first_tokens = (skipped..).step_by(set.block_len());
                pieces.extend(new.iter_mut().zip(first_tokens).map(|(block, first)| EncodePiece::Block {
                    set,
                    tokens,
                    first,
                    position: tail_at + first,
                    block,
                }));
            }
            (Some(Coded::LowRank(coder, _)), NewCoded::LowRank(new)) => {
                memory::reserve(pieces, new.len(), "a list of tasks")?;
                pieces.extend(new.iter_mut().enumerate().map(|(head, coded)| EncodePiece::Vectors {
                    coder,
                    vectors: tokens.tokens_from(head, skipped).data,
                    coded,
                }));
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the oldest `n_tokens` out of the tail, now that all pieces have been coded everywhere.
    pub(crate) fn commit(&mut self, new: NewCoded, n_tokens: usize) {
        match (&mut self.coded, new) {
            (Some(Coded::Blocks(_, blocks)), NewCoded::Blocks(new)) => {
                blocks.extend(new.into_iter().flatten())
            }
            (Some(Coded::LowRank(coder, heads)), NewCoded::LowRank(new)) => {
                for (coded, new) in heads.iter_mut().zip(new) {
                    coded.extend(new);
                    trim(coded, coder.vector_bytes());
                }
            }
            _ => return,
        }
        if n_tokens > 0 {
            self.tail.drop_front(n_tokens);
        }
    }

    /// Writes head `head` of some tokens to the front of `out`, `[tokens, head_dim]`: exact ones at once, of coded ones
    /// it lists the pieces.
    pub(crate) fn read_head<'a>(
        &'a self,
        head: usize,
        tokens: Range<usize>,
        out: &'a mut [E],
        pieces: &mut Vec<ReadPiece<'a, E>>,
    ) -> Result<()> {
        let (coded_at, tail_at) = (self.coded_at(), self.tail_at());
        let mut out = self.sinks.read(head, part(&tokens, self.first..coded_at), out);
        let of_coded = part(&tokens, coded_at..tail_at);
        // Tokens of a piece, and tokens that a piece begins with a multiple of.
        let (len, d) = match &self.coded {
            None => (1, 0),
            Some(Coded::Blocks(set, _)) => (set.block_len(), set.head_dim()),
            Some(Coded::LowRank(coder, _)) => (LOW_RANK_TOKENS, coder.head_dim()),
        };
        let touched = of_coded.start / len..of_coded.end.div_ceil(len);
        memory::reserve(pieces, touched.len(), "a list of tasks")?;
        for at in touched {
            let within = part(&of_coded, at * len..(at + 1) * len);
            let (piece, rest) = out.split_at_mut(within.len() * d);
            out = rest;
            match &self.coded {
                Some(Coded::Blocks(set, blocks)) => pieces.push(ReadPiece::Block {
                    set,
                    block: &blocks[at],
                    head,
                    position: coded_at + at * len,
                    within,
                    out: piece,
                }),
                Some(Coded::LowRank(coder, heads)) => {
                    let (first, bytes) = (at * len, coder.vector_bytes());
                    let coded = &heads[head][(first + within.start) * bytes..(first + within.end) * bytes];
                    pieces.push(ReadPiece::Vectors { coder, coded, out: piece });
                }
                None => {}
            }
        }
        self.tail.read(head, part(&tokens, tail_at..tail_at + self.n_tail()), out);
        Ok(())
    }

    /// Decodes the block that removing the newest `n_tokens` would cut, for [`SideRow::crop`]. Changes nothing.
    pub(crate) fn cut(&self, n_tokens: usize) -> Result<Cut<E>> {
        let from_coded = n_tokens.saturating_sub(self.n_tail()).min(self.n_coded());
        let Some(Coded::Blocks(set, blocks)) = &self.coded else { return Ok(Cut(None)) };
        let (len, d) = (set.block_len(), set.head_dim());
        let kept = self.n_coded() - from_coded;
        let (whole, partial) = (kept / len, kept % len);
        if partial == 0 {
            return Ok(Cut(None));
        }
        let mut scratch = Scratch::default();
        let mut heads = memory::room(set.streams().len(), "a decoded block")?;
        for head in 0..set.streams().len() {
            let mut out = memory::filled(len * d, E::default(), "a decoded block")?;
            let position = self.coded_at() + whole * len;
            blocks[whole].decode(set, head, position, best_isa(), &mut out, &mut scratch)?;
            out.truncate(partial * d);
            heads.push(out);
        }
        Ok(Cut(Some(ExactRun::from_decoded(heads, d))))
    }

    /// Removes the newest `n_tokens`. A block that is cut goes back to the tail as decoded, without its lost tokens.
    pub(crate) fn crop(&mut self, n_tokens: usize, cut: Cut<E>) {
        let from_tail = n_tokens.min(self.n_tail());
        let from_coded = (n_tokens - from_tail).min(self.n_coded());
        let kept = self.n_coded() - from_coded;
        self.tail.truncate(self.n_tail() - from_tail);
        if let Cut(Some(rest)) = cut {
            self.tail = rest;
        }
        match &mut self.coded {
            None => {}
            Some(Coded::Blocks(set, blocks)) => blocks.truncate(kept / set.block_len()),
            Some(Coded::LowRank(coder, heads)) => {
                heads.iter_mut().for_each(|coded| coded.truncate(kept * coder.vector_bytes()));
            }
        }
        self.sinks.truncate(self.sinks.n_tokens() - (n_tokens - from_tail - from_coded));
    }

    /// What is before `position`, oldest first; coded tokens in whole blocks, others some at a time.
    pub(crate) fn stale(&self, position: usize) -> Stale {
        let n_sinks = position.saturating_sub(self.first).min(self.sinks.n_tokens());
        let n_coded = position.saturating_sub(self.coded_at()).min(self.n_coded());
        let n_coded = match &self.coded {
            Some(Coded::Blocks(set, _)) => n_coded / set.block_len() * set.block_len(),
            _ => dropped_together(n_coded, self.n_coded()),
        };
        let n_tail = position.saturating_sub(self.tail_at()).min(self.n_tail());
        let n_tail = if n_coded == self.n_coded() { dropped_together(n_tail, self.n_tail()) } else { 0 };
        Stale { n_sinks, n_coded, n_tail }
    }

    /// Drops what [`SideRow::stale`] has found.
    pub(crate) fn forget(&mut self, stale: &Stale) {
        let Stale { n_sinks, n_coded, n_tail } = *stale;
        if n_sinks > 0 {
            self.sinks.drop_front(n_sinks);
        }
        match &mut self.coded {
            Some(Coded::Blocks(set, blocks)) => drop(blocks.drain(..n_coded / set.block_len())),
            Some(Coded::LowRank(coder, heads)) if n_coded > 0 => {
                // Room stays: it may be reserved for what is about to be coded.
                heads.iter_mut().for_each(|coded| drop(coded.drain(..n_coded * coder.vector_bytes())));
            }
            _ => {}
        }
        if n_tail > 0 {
            self.tail.drop_front(n_tail);
        }
        self.first += n_sinks + n_coded + n_tail;
    }

    /// Bytes of sinks and tail.
    pub(crate) fn exact_bytes(&self) -> usize {
        self.sinks.bytes() + self.tail.bytes()
    }

    /// Bytes of the coded middle; blocks whose address is in `seen` are shared and were counted before.
    pub(crate) fn coded_bytes(&self, seen: &mut HashSet<usize>) -> usize {
        match &self.coded {
            None => 0,
            Some(Coded::Blocks(_, blocks)) => {
                let new = blocks.iter().filter(|block| seen.insert(Arc::as_ptr(block) as usize));
                new.map(|block| block.bytes()).sum()
            }
            Some(Coded::LowRank(_, heads)) => heads.iter().map(Vec::capacity).sum(),
        }
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
