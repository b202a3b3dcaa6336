//! A layer's cache as a state machine, against a plain model of itself: lists of tokens, of which the coded ones have been
//! through the codec. Both must hold the same bits after every step.

use std::ops::Range;

use half::{bf16, f16};
use kvlathe::cache::{CacheError, Coding, LayerCache, Policy, TensorView};
use kvlathe::codec::gain::MAX_MAGNITUDE;
use kvlathe::codec::{Element, Scratch, Side, Tokens, best_isa};

use crate::small_layer::{DIM, HEADS, codings, empty, policy};
use crate::source::Source;

/// Most rows, and most tokens held, to keep a step short.
const MOST_ROWS: usize = 5;
const MOST_TOKENS: usize = 160;
const MOST_STEPS: usize = 64;

/// All heads of one token.
type Token<E> = [[E; DIM]; HEADS];

/// Exact tokens leave a window so many at a time at least.
const FORGOTTEN_TOGETHER: usize = 16;

/// One side of all rows, as lists of tokens.
#[derive(Clone)]
struct Lists<E> {
    coding: Coding,
    /// All tokens of the sequence, also those that were forgotten.
    rows: Vec<Vec<Token<E>>>,
    /// Where tokens that are held begin.
    first: usize,
    /// Tokens after the sinks that have been through the codec.
    n_coded: usize,
}

impl<E: Element> Lists<E> {
    fn is_coded(&self) -> bool {
        !matches!(self.coding, Coding::Exact)
    }

    fn n_tokens(&self) -> usize {
        self.rows[0].len()
    }

    /// Where coded tokens begin: behind the sinks, as far as these are held.
    fn coded_at(&self, policy: Policy) -> usize {
        let n_sinks = if self.is_coded() { policy.n_sinks.min(self.n_tokens()) } else { 0 };
        self.first.max(n_sinks)
    }

    /// Tokens of a block.
    fn block_len(&self) -> usize {
        match &self.coding {
            Coding::Exact => 1,
            Coding::Blocks(set) => set.block_len(),
        }
    }

    /// Sends every whole block that has left the tail through the codec; blocks begin at multiples of their length.
    fn compress(&mut self, policy: Policy) {
        if !self.is_coded() || self.n_tokens() <= policy.compress_start_len {
            return;
        }
        let len = self.block_len();
        loop {
            let from = self.coded_at(policy) + self.n_coded;
            let position = from / len * len;
            if self.n_tokens().saturating_sub(policy.n_tail) < position + len {
                return;
            }
            for row in &mut self.rows {
                // Sinks are kept elsewhere, and what was forgotten nowhere.
                let mut block = vec![[[E::default(); DIM]; HEADS]; len];
                block[from - position..].copy_from_slice(&row[from..position + len]);
                code(&self.coding, &mut block, position);
                row[from..position + len].copy_from_slice(&block[from - position..]);
            }
            self.n_coded += position + len - from;
        }
    }

    fn crop(&mut self, n_tokens: usize, policy: Policy) {
        let (kept, coded_at, len) = (self.n_tokens() - n_tokens, self.coded_at(policy), self.block_len());
        self.rows.iter_mut().for_each(|row| row.truncate(kept));
        // Whole blocks stay coded.
        if kept < coded_at + self.n_coded {
            self.n_coded = (kept / len * len).saturating_sub(coded_at);
        }
    }

    /// Sinks leave one by one, coded tokens in whole blocks, others some at a time and only when none is coded.
    fn forget_before(&mut self, position: usize, policy: Policy) {
        let (coded_at, len) = (self.coded_at(policy), self.block_len());
        let coded_end = coded_at + self.n_coded;
        self.first = self.first.max(position.min(coded_at));
        let whole = position.min(coded_end) / len * len;
        if self.n_coded > 0 && whole > coded_at {
            self.first = whole;
            self.n_coded = coded_end - whole;
        }
        if self.n_coded == 0 && position > coded_end {
            let (n, held) = (position.min(self.n_tokens()) - coded_end, self.n_tokens() - coded_end);
            // All of them at any time.
            self.first = coded_end + if n == held { n } else { n / FORGOTTEN_TOGETHER * FORGOTTEN_TOGETHER };
        }
    }
}

/// Tokens of a block, whose first slot has position `first`, become what is decoded.
fn code<E: Element>(coding: &Coding, tokens: &mut [Token<E>], first: usize) {
    let Coding::Blocks(set) = coding else { return };
    for head in 0..HEADS {
        let mut x: Vec<E> = tokens.iter().flat_map(|token| token[head]).collect();
        let (stream, mut scratch) = (&set.streams()[head], Scratch::default());
        let (back, forward) = set.frame(first).unzip();
        let mut packed = vec![0; stream.block_bytes()];
        let given = Tokens { data: &x, token_stride: DIM };
        stream.encode_block(best_isa(), given, back.as_ref(), &mut packed, &mut scratch).expect("it fits");
        stream.decode_block(best_isa(), &packed, forward.as_ref(), &mut x, &mut scratch).expect("it fits");
        for (token, x) in tokens.iter_mut().zip(x.chunks_exact(DIM)) {
            token[head].copy_from_slice(x);
        }
    }
}

/// The cache and what it should hold.
struct Pair<E> {
    cache: LayerCache<E>,
    policy: Policy,
    /// Keys and values.
    sides: [Lists<E>; 2],
}

impl<E: Element> Pair<E> {
    fn new(source: &mut Source<'_>) -> Option<Self> {
        let (codings, policy) = (codings(source), policy(source));
        let cache = empty(&codings, policy, 1)?;
        let sides = codings.map(|coding| Lists { coding, rows: vec![Vec::new()], first: 0, n_coded: 0 });
        Some(Self { cache, policy, sides })
    }

    fn copy(&self) -> Self {
        let cache = self.cache.try_clone().expect("memory for a few tokens");
        Self { cache, policy: self.policy, sides: self.sides.clone() }
    }

    fn batch(&self) -> usize {
        self.sides[0].rows.len()
    }

    fn n_tokens(&self) -> usize {
        self.sides[0].n_tokens()
    }

    fn append(&mut self, source: &mut Source<'_>) {
        let n = source.below(40).min(MOST_TOKENS - (self.n_tokens() - self.first()));
        let is_other = source.below(16) == 0;
        let batch = if is_other { self.batch() + 1 } else { self.batch() };
        let wild = source.below(4) == 0;
        let mut serial = usize::from(source.any::<u16>());
        let new = [(), ()].map(|()| {
            let tokens = vec![[[E::default(); DIM]; HEADS]; n];
            let mut rows = vec![tokens; batch];
            for value in rows.iter_mut().flatten().flatten().flatten() {
                serial += 1;
                let tame = (serial as f32 * 0.61).sin() * (1 + serial % 7) as f32;
                *value =
                    E::from_f32(if wild && serial.is_multiple_of(11) { source.activation() } else { tame });
            }
            rows
        });
        // As a model hands tokens over, tokens before heads; or heads first.
        let heads_first = source.any::<bool>();
        let data = new.each_ref().map(|rows| flat(rows, heads_first));
        let strides =
            if heads_first { [HEADS * n * DIM, n * DIM, DIM] } else { [n * HEADS * DIM, DIM, HEADS * DIM] };
        let [keys, values] = data
            .each_ref()
            .map(|data| TensorView::new(data, [batch, HEADS, n, DIM], strides).expect("it fits"));

        let fits = self.sides.iter().zip(&new).all(|(side, rows)| {
            let all = rows.iter().flatten().flatten().flatten();
            !side.is_coded() || all.map(|v| v.to_f32().abs()).all(|v| v <= MAX_MAGNITUDE)
        });
        let given = self.cache.append(keys, values);
        assert_eq!(given.is_ok(), fits && !is_other, "{given:?}");
        if given.is_ok() {
            for (side, new) in self.sides.iter_mut().zip(new) {
                side.rows.iter_mut().zip(new).for_each(|(row, new)| row.extend(new));
            }
        }
    }

    fn compress(&mut self) {
        self.cache.compress(1).expect("what was taken can be coded");
        self.compressed();
    }

    fn forget(&mut self) {
        let position = self.policy.first_seen(self.n_tokens());
        self.cache.forget();
        for side in &mut self.sides {
            side.forget_before(position, self.policy);
        }
    }

    fn settle(&mut self) {
        let position = self.policy.first_seen(self.n_tokens());
        self.cache.settle(1).expect("what was taken can be coded");
        for side in &mut self.sides {
            side.forget_before(position, self.policy);
        }
        self.compressed();
    }

    fn compressed(&mut self) {
        assert!(!self.cache.is_due());
        for side in &mut self.sides {
            side.compress(self.policy);
        }
    }

    /// Where both sides are held from.
    fn first(&self) -> usize {
        self.sides[0].first.max(self.sides[1].first)
    }

    fn crop(&mut self, n: usize) {
        let held = self.n_tokens() - self.first();
        if n > held {
            assert_eq!(self.cache.crop(n), Err(CacheError::Crop { given: n, held }));
            return;
        }
        self.cache.crop(n).expect("so many are held");
        for side in &mut self.sides {
            side.crop(n, self.policy);
        }
    }

    /// Reorders, repeats or drops rows.
    fn select(&mut self, rows: &[usize]) {
        let given = self.cache.select(rows);
        let is_right = !rows.is_empty() && rows.iter().all(|&row| row < self.batch());
        assert_eq!(given.is_ok(), is_right, "{given:?}");
        if is_right {
            for side in &mut self.sides {
                side.rows = rows.iter().map(|&row| side.rows[row].clone()).collect();
            }
        }
    }

    /// Goes on with a layer that holds what this one has exported.
    fn exchange(&mut self) {
        let codings = self.sides.each_ref().map(|side| side.coding.clone());
        let mut other = empty(&codings, self.policy, self.batch()).expect("as before");
        let [keys, values] = Side::ALL.map(|side| self.cache.export_side(side).expect("codecs with names"));
        let wanted = self.policy.first_seen(self.n_tokens());
        match other.import(keys.as_parts(), values.as_parts()) {
            Ok(()) => self.cache = other,
            // Cropped to where its window would show tokens that are gone.
            Err(error) => {
                assert!(matches!(error, CacheError::Forgotten { wanted: w, .. } if w == wanted), "{error}");
                assert!(wanted < self.first(), "what has come out goes in");
            }
        }
    }

    fn check(&self, more_room: usize) {
        let (first, n, batch) = (self.first(), self.n_tokens(), self.batch());
        assert_eq!(self.cache.first(), first);
        let n_coded = self.sides.iter().map(|side| side.n_coded).max();
        assert_eq!(
            (self.cache.batch(), self.cache.n_tokens(), Some(self.cache.n_coded())),
            (batch, n, n_coded)
        );
        let (held, room) = (n - first, n - first + more_room);
        for (side, which) in self.sides.iter().zip(Side::ALL) {
            let read = |tokens: Range<usize>, room: usize| {
                let mut got = vec![E::from_f32(7.0); batch * HEADS * room * DIM];
                self.cache.read(which, tokens, &mut got, room, 1).expect("there is room");
                got
            };
            let got = read(first..n, room);
            // Blocks and exact runs cut anywhere.
            let some = first + held / 3..n - held / 5;
            let part = read(some.clone(), some.len());
            for (part, all) in
                part.chunks_exact((some.len() * DIM).max(1)).zip(got.chunks_exact((room * DIM).max(1)))
            {
                let same = |(a, b): (&E, &E)| a.to_f32().to_bits() == b.to_f32().to_bits();
                assert!(
                    part.iter().zip(&all[(some.start - first) * DIM..]).all(same),
                    "{which}, tokens {some:?} of {n}"
                );
            }
            for (head, got) in got.chunks_exact((room * DIM).max(1)).enumerate() {
                let expected = side.rows[head / HEADS][first..].iter().map(|token| token[head % HEADS]);
                for (token, (got, expected)) in got.chunks_exact(DIM).zip(expected).enumerate() {
                    // By bits: an exact side may hold NaN.
                    let same =
                        got.iter().zip(&expected).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
                    assert!(same, "{which}, head {head}, token {token} of {n}: {got:?} for {expected:?}");
                }
            }
        }
        // Exact tokens take their room, and nothing takes more than if no row shared anything.
        let memory = self.cache.memory_use();
        let exact: usize = self.sides.iter().map(|side| n - side.first - side.n_coded).sum();
        assert!(memory.exact_bytes >= exact * batch * HEADS * DIM * size_of::<E>());
        assert!(memory.coded_bytes > 0 || n_coded == Some(0));
    }
}

/// `[batch, heads, tokens, DIM]`, or with tokens before heads.
fn flat<E: Element>(rows: &[Vec<Token<E>>], heads_first: bool) -> Vec<E> {
    let mut data = Vec::new();
    for row in rows {
        if heads_first {
            (0..HEADS).for_each(|head| data.extend(row.iter().flat_map(|token| token[head])));
        } else {
            data.extend(row.iter().flatten().flatten());
        }
    }
    data
}

pub(crate) fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    match source.below(3) {
        0 => steps::<f32>(&mut source),
        1 => steps::<bf16>(&mut source),
        _ => steps::<f16>(&mut source),
    }
}

fn steps<E: Element>(source: &mut Source<'_>) {
    let Some(mut pair) = Pair::<E>::new(source) else { return };
    let empty = pair.copy();
    // A copy that was put aside, as of a prompt's cache.
    let mut copy = pair.copy();
    for _ in 0..MOST_STEPS {
        if source.is_empty() {
            break;
        }
        match source.below(16) {
            0..5 => {
                pair.append(source);
                pair.compress();
            }
            5 | 6 => pair.append(source),
            7 => pair.compress(),
            8 | 9 => pair.crop(source.below(30)),
            10 if source.any() => pair.settle(),
            10 => pair.forget(),
            11 | 12 => {
                let rows: Vec<usize> =
                    (0..source.below(MOST_ROWS + 1)).map(|_| source.below(MOST_ROWS)).collect();
                pair.select(&rows);
            }
            13 => copy = pair.copy(),
            14 => std::mem::swap(&mut pair, &mut copy),
            15 if source.any() => pair.exchange(),
            _ => pair = empty.copy(),
        }
        pair.check(source.below(3));
    }
    copy.check(0);
}
