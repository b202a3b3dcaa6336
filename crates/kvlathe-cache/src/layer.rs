//! The cache of one layer.

use std::collections::HashSet;
use std::ops::Range;

use kvlathe_codec::{Element, Side, StreamSet, memory};

use crate::block::{Decoding, Encoding};
use crate::coding::Coding;
use crate::error::{CacheError, Result};
use crate::policy::Policy;
use crate::side::{SideRow, Stale};
use crate::threads::for_each_item;
use crate::view::TensorView;

/// What a layer holds, in bytes truly allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Sinks, tail and sides that are not coded.
    pub exact_bytes: usize,
    /// Packed blocks with their side information and padding.
    pub coded_bytes: usize,
    /// Those of `coded_bytes` that lie in somebody else's memory, such as a mapped file: blocks that were imported.
    pub foreign_bytes: usize,
}

/// Keys and values.
pub(crate) struct Row<E> {
    pub(crate) key: SideRow<E>,
    pub(crate) value: SideRow<E>,
}

impl<E: Element> Row<E> {
    fn sides(&self) -> [&SideRow<E>; 2] {
        [&self.key, &self.value]
    }

    pub(crate) fn side(&self, side: Side) -> &SideRow<E> {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    fn sides_mut(&mut self) -> [&mut SideRow<E>; 2] {
        [&mut self.key, &mut self.value]
    }

    fn try_clone(&self) -> Result<Self> {
        Ok(Self { key: self.key.try_clone()?, value: self.value.try_clone()? })
    }
}

/// Keys and values of one layer for a batch of sequences of equal length (padding included).
pub struct LayerCache<E> {
    pub(crate) key: Coding,
    pub(crate) value: Coding,
    pub(crate) policy: Policy,
    pub(crate) rows: Vec<Row<E>>,
    n_heads: usize,
    key_dim: usize,
    value_dim: usize,
    pub(crate) n_tokens: usize,
}

impl<E: Element> LayerCache<E> {
    /// An empty cache for `batch` sequences.
    ///
    /// # Errors
    /// Heads or head_dim that are not the codec's, different block lengths for keys and values.
    pub fn new(
        key: Coding,
        value: Coding,
        policy: Policy,
        batch: usize,
        n_heads: usize,
        (key_dim, value_dim): (usize, usize),
    ) -> Result<Self> {
        key.check_shape(n_heads, key_dim)?;
        value.check_shape(n_heads, value_dim)?;
        if let (Coding::Blocks(k), Coding::Blocks(v)) = (&key, &value)
            && k.block_len() != v.block_len()
        {
            return Err(CacheError::BlockLen { key: k.block_len(), value: v.block_len() });
        }
        if batch == 0 || n_heads == 0 || key_dim == 0 || value_dim == 0 {
            return Err(CacheError::Shape {
                what: "the smallest of batch, heads and head_dim",
                given: 0,
                expected: 1,
            });
        }
        let mut rows = memory::room(batch, "rows")?;
        rows.resize_with(batch, || Row {
            key: SideRow::new(&key, n_heads, key_dim),
            value: SideRow::new(&value, n_heads, value_dim),
        });
        Ok(Self { key, value, policy, rows, n_heads, key_dim, value_dim, n_tokens: 0 })
    }

    /// A copy that shares the packed blocks.
    ///
    /// # Errors
    /// No memory for the exact tokens.
    pub fn try_clone(&self) -> Result<Self> {
        let every_row: Vec<usize> = (0..self.batch()).collect();
        Ok(Self {
            key: self.key.clone(),
            value: self.value.clone(),
            rows: self.selected(&every_row)?,
            ..*self
        })
    }

    /// Copies of rows that exist.
    fn selected(&self, rows: &[usize]) -> Result<Vec<Row<E>>> {
        let mut selected = memory::room(rows.len(), "rows")?;
        for &row in rows {
            selected.push(self.rows[row].try_clone()?);
        }
        Ok(selected)
    }

    /// Sequences.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of each sequence, forgotten ones among them.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Which tokens stay exact, and which are held.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Position from which on both sides are held: above zero once tokens have left a sliding window.
    #[must_use]
    pub fn first(&self) -> usize {
        self.rows.first().map_or(0, |row| row.key.first().max(row.value.first()))
    }

    /// Tokens that are held in coded form (on at least one side).
    #[must_use]
    pub fn n_coded(&self) -> usize {
        self.rows.first().map_or(0, |row| row.key.n_coded().max(row.value.n_coded()))
    }

    /// KV heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.n_heads
    }

    /// Components of a side's vectors.
    #[must_use]
    pub fn head_dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.key_dim,
            Side::Value => self.value_dim,
        }
    }

    /// Keys and values of one row.
    pub(crate) fn sides(&self, row: usize) -> (&SideRow<E>, &SideRow<E>) {
        (&self.rows[row].key, &self.rows[row].value)
    }

    /// The codecs, if both sides are coded in blocks.
    pub(crate) fn stream_sets(&self) -> Option<(&StreamSet, &StreamSet)> {
        Some((self.key.stream_set()?, self.value.stream_set()?))
    }

    /// Appends tokens, exact for now; [`LayerCache::compress`] codes what has left the tail.
    ///
    /// # Errors
    /// Another batch size, heads or head_dim than the cache's, keys and values of different length, NaN or infinity
    /// on a side that is coded, no memory. The cache is unchanged then.
    pub fn append(&mut self, keys: TensorView<'_, E>, values: TensorView<'_, E>) -> Result<()> {
        self.check_view(&keys, Side::Key)?;
        self.check_view(&values, Side::Value)?;
        if keys.n_tokens() != values.n_tokens() {
            let (given, expected) = (values.n_tokens(), keys.n_tokens());
            return Err(CacheError::Shape { what: "the number of new value tokens", given, expected });
        }
        self.key.check_values(&keys, Side::Key.plural())?;
        self.value.check_values(&values, Side::Value.plural())?;
        self.reserve(keys.n_tokens())?;
        for (at, row) in self.rows.iter_mut().enumerate() {
            row.key.append(&keys, at, self.policy.n_sinks);
            row.value.append(&values, at, self.policy.n_sinks);
        }
        self.n_tokens += keys.n_tokens();
        Ok(())
    }

    /// That a tensor has the cache's batch, heads and head_dim.
    pub(crate) fn check_view(&self, view: &TensorView<'_, E>, side: Side) -> Result<()> {
        let what = match side {
            Side::Key => "head_dim of the keys",
            Side::Value => "head_dim of the values",
        };
        let [batch, heads, _, d] = view.shape();
        for (what, given, expected) in [
            ("batch size", batch, self.batch()),
            ("the number of KV heads", heads, self.n_heads),
            (what, d, self.head_dim(side)),
        ] {
            if given != expected {
                return Err(CacheError::Shape { what, given, expected });
            }
        }
        Ok(())
    }

    /// Makes room for `n_tokens` in every row, or in none.
    fn reserve(&mut self, n_tokens: usize) -> Result<()> {
        let n_sinks = self.policy.n_sinks;
        let made = self.rows.iter_mut().try_for_each(|row| {
            row.key.reserve(n_tokens, n_sinks)?;
            row.value.reserve(n_tokens, n_sinks)
        });
        if made.is_err() {
            self.rows.iter_mut().flat_map(Row::sides_mut).for_each(SideRow::trim);
        }
        made
    }

    /// Whether [`LayerCache::compress`] would code anything: a look, without work.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.codes_behind(0)
    }

    /// Whether [`LayerCache::settle`] would code or drop anything: a look, without work.
    #[must_use]
    pub fn would_settle(&self) -> bool {
        let position = self.policy.first_seen(self.n_tokens);
        self.codes_behind(position)
            || self
                .rows
                .first()
                .is_some_and(|row| row.sides().into_iter().any(|side| !side.stale(position).is_empty()))
    }

    /// Whether blocks are due once what is before `position` is gone.
    fn codes_behind(&self, position: usize) -> bool {
        self.rows.first().is_some_and(|row| {
            row.sides().into_iter().any(|side| self.n_due(side, &side.stale(position)) > 0)
        })
    }

    /// How many blocks of a side have left the tail, once those tokens that are stale are gone.
    fn n_due(&self, side: &SideRow<E>, stale: &Stale) -> usize {
        if self.n_tokens <= self.policy.compress_start_len {
            return 0;
        }
        side.n_due(self.policy.n_tail, stale)
    }

    /// Codes every whole block that has left the tail, on at most `n_threads` threads. Drops nothing.
    ///
    /// # Errors
    /// What the codec refuses, no memory. All tokens stay exact then.
    pub fn compress(&mut self, n_threads: usize) -> Result<()> {
        self.code_behind(0, n_threads)
    }

    /// As [`LayerCache::compress`], but first drops what has left the sliding window, which is not coded then. Positions
    /// go on counting. Blocks leave whole and other tokens some at a time, so that up to a block less one, or fifteen,
    /// stay.
    ///
    /// # Errors
    /// As [`LayerCache::compress`]. Nothing is dropped then.
    pub fn settle(&mut self, n_threads: usize) -> Result<()> {
        self.code_behind(self.policy.first_seen(self.n_tokens), n_threads)
    }

    /// Drops what is before `position` and codes what is due then; both or neither.
    fn code_behind(&mut self, position: usize, n_threads: usize) -> Result<()> {
        if !self.codes_behind(position) {
            self.forget_before(position);
            return Ok(());
        }
        let n_sides = 2 * self.rows.len();
        let mut plans = memory::room(n_sides, "coded tokens")?;
        for side in self.rows.iter().flat_map(Row::sides) {
            let stale = side.stale(position);
            plans.push((self.n_due(side, &stale), stale));
        }
        let mut new = memory::room(n_sides, "coded tokens")?;
        for (side, (n_blocks, _)) in self.rows.iter_mut().flat_map(Row::sides_mut).zip(&plans) {
            new.push(side.reserve_blocks(*n_blocks)?);
        }
        let mut encodings = Vec::new();
        for ((side, new), (_, stale)) in self.rows.iter().flat_map(Row::sides).zip(&mut new).zip(&plans) {
            side.encodings(stale, new, &mut encodings)?;
        }
        // Nothing goes before every side has been coded: an error must find all sides alike.
        for_each_item(n_threads, encodings, Encoding::encode)?;
        for ((side, new), (_, stale)) in self.rows.iter_mut().flat_map(Row::sides_mut).zip(new).zip(plans) {
            side.forget(&stale);
            side.commit(new);
        }
        Ok(())
    }

    /// Drops what has left the sliding window, as [`LayerCache::settle`] does, and codes nothing.
    pub fn forget(&mut self) {
        self.forget_before(self.policy.first_seen(self.n_tokens));
    }

    fn forget_before(&mut self, position: usize) {
        for side in self.rows.iter_mut().flat_map(Row::sides_mut) {
            let stale = side.stale(position);
            side.forget(&stale);
        }
    }

    /// Writes some tokens of one side to the first ones of `out`, `[batch, heads, out_tokens, head_dim]` contiguous, on
    /// at most `n_threads` threads.
    ///
    /// # Errors
    /// A buffer of another size, fewer `out_tokens` than tokens asked for, tokens that this side does not hold, no memory.
    pub fn read(
        &self,
        side: Side,
        tokens: Range<usize>,
        out: &mut [E],
        out_tokens: usize,
        n_threads: usize,
    ) -> Result<()> {
        if tokens.end > self.n_tokens {
            let (given, expected) = (tokens.end, self.n_tokens);
            return Err(CacheError::Shape { what: "the end of the tokens to read", given, expected });
        }
        check_held(&tokens, self.rows[0].side(side).first())?;
        let dim = self.head_dim(side);
        let expected = self.batch() * self.n_heads * out_tokens * dim;
        if out.len() != expected || out_tokens < tokens.len() {
            return Err(CacheError::Buffer { what: "output", given: out.len(), expected });
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let mut decodings = Vec::new();
        for (at, out) in out.chunks_mut(out_tokens * dim).enumerate() {
            let (row, head) = (&self.rows[at / self.n_heads], at % self.n_heads);
            row.side(side).read_head(head, tokens.clone(), out, &mut decodings)?;
        }
        for_each_item(n_threads, decodings, Decoding::decode)
    }

    /// Removes the newest `n_tokens` of every sequence.
    ///
    /// Tokens of the exact tail vanish without a trace. A cut into coded tokens keeps the rest of their block as
    /// decoded values in the tail.
    ///
    /// # Errors
    /// More tokens than are held, no memory for the rest of a block. The cache is unchanged then.
    pub fn crop(&mut self, n_tokens: usize) -> Result<()> {
        let held = self.n_tokens - self.first();
        if n_tokens > held {
            return Err(CacheError::Crop { given: n_tokens, held });
        }
        let mut cuts = memory::room(self.batch(), "rows")?;
        for row in &self.rows {
            cuts.push((row.key.cut(n_tokens)?, row.value.cut(n_tokens)?));
        }
        for (row, (key, value)) in self.rows.iter_mut().zip(cuts) {
            row.key.crop(n_tokens, key);
            row.value.crop(n_tokens, value);
        }
        self.n_tokens -= n_tokens;
        Ok(())
    }

    /// Replaces the batch by the given rows, in that order; rows may repeat (beams) or be left out. Blocks are shared.
    ///
    /// # Errors
    /// A row that does not exist, or none at all; no memory. The cache is unchanged then.
    pub fn select(&mut self, rows: &[usize]) -> Result<()> {
        if let Some(&given) = rows.iter().find(|&&row| row >= self.batch()) {
            return Err(CacheError::Row { given, rows: self.batch() });
        }
        if rows.is_empty() {
            return Err(CacheError::Shape { what: "the number of rows to keep", given: 0, expected: 1 });
        }
        self.rows = self.selected(rows)?;
        Ok(())
    }

    /// Bytes held. A block that several rows share counts once.
    #[must_use]
    pub fn memory_use(&self) -> MemoryUse {
        let mut seen = HashSet::new();
        let mut use_ = MemoryUse::default();
        for side in self.rows.iter().flat_map(Row::sides) {
            use_.exact_bytes += side.exact_bytes();
            let (coded, foreign) = side.coded_bytes(&mut seen);
            use_.coded_bytes += coded;
            use_.foreign_bytes += foreign;
        }
        use_
    }
}

/// That none of some tokens was forgotten, where those from `first` on are held.
pub(crate) fn check_held(tokens: &Range<usize>, first: usize) -> Result<()> {
    let wanted = tokens.start;
    if tokens.is_empty() || wanted >= first { Ok(()) } else { Err(CacheError::Forgotten { wanted, first }) }
}
