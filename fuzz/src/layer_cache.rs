//! A layer's cache as a state machine, against a plain model of itself: lists of tokens, of which the coded ones have been
//! through the codec. Both must hold the same bits after every step.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use half::{bf16, f16};
use kvlathe::cache::{CacheError, Coding, LayerCache, Policy, TensorView};
use kvlathe::codec::gain::MAX_MAGNITUDE;
use kvlathe::codec::{
    Basis, Element, LowRank, Pairing, Rope, Scratch, Storage, StreamSet, Tokens, WIDTHS, best_isa,
};

use crate::source::Source;

const HEADS: usize = 2;
const DIM: usize = 8;
/// Most rows, and most tokens held, to keep a step short.
const MOST_ROWS: usize = 5;
const MOST_TOKENS: usize = 160;
const MOST_STEPS: usize = 64;

/// All heads of one token.
type Token<E> = [[E; DIM]; HEADS];

/// Every way to store a side.
static CODINGS: LazyLock<[Coding; 6]> = LazyLock::new(|| {
    let blocks = |rope: bool, block_len| {
        let rope = rope.then(|| {
            let frequencies = vec![1.0, 0.1, 0.01, 0.001];
            Arc::new(Rope::new(Pairing::HalfSplit, DIM, frequencies).expect("a rotation"))
        });
        let bases = [0.1, -0.2].map(|mean| Basis {
            mean: vec![mean; DIM],
            synthesis: (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.03 }).collect(),
            importance: vec![1.0; DIM],
            widths: (0..DIM).map(|i| WIDTHS[5 - i % 6]).collect(),
        });
        Coding::Blocks(Arc::new(StreamSet::new(&bases, rope, block_len).expect("a codec")))
    };
    let low_rank = |rank, storage| {
        let u: Vec<f32> = (0..DIM * rank).map(|i| f32::from(u8::from(i / rank == i % rank))).collect();
        Coding::LowRank(Arc::new(LowRank::new(&u, &[0.5; DIM], rank, storage).expect("a codec")))
    };
    [
        Coding::Exact,
        blocks(true, 8),
        blocks(false, 8),
        blocks(false, 16),
        low_rank(5, Storage::Int8),
        low_rank(DIM, Storage::Float16),
    ]
});

/// Exact tokens, and those of a low-rank coding, leave a window so many at a time at least.
const FORGOTTEN_TOGETHER: usize = 16;

/// One side of all rows.
#[derive(Clone)]
struct Side<E> {
    coding: Coding,
    /// All tokens of the sequence, also those that were forgotten.
    rows: Vec<Vec<Token<E>>>,
    /// Where tokens that are held begin.
    first: usize,
    /// Tokens after the sinks that have been through the codec.
    n_coded: usize,
}

impl<E: Element> Side<E> {
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

    /// Sends what has left the tail through the codec, in runs of `granularity`.
    fn compress(&mut self, policy: Policy, granularity: usize) {
        if !self.is_coded() || self.n_tokens() <= policy.compress_start_len {
            return;
        }
        let mut first = self.coded_at(policy) + self.n_coded;
        while self.n_tokens() - first >= policy.n_tail + granularity {
            let own = self.coding.granularity();
            for at in (first..first + granularity).step_by(own) {
                for row in &mut self.rows {
                    code(&self.coding, &mut row[at..at + own], at);
                }
            }
            self.n_coded += granularity;
            first += granularity;
        }
    }

    fn crop(&mut self, n_tokens: usize, policy: Policy) {
        let (kept, coded_at) = (self.n_tokens() - n_tokens, self.coded_at(policy));
        self.rows.iter_mut().for_each(|row| row.truncate(kept));
        // Whole blocks stay coded.
        let own = self.coding.granularity();
        self.n_coded = self.n_coded.min(kept.saturating_sub(coded_at) / own * own);
    }

    /// Sinks leave one by one, coded tokens in whole blocks, others some at a time and only when none is coded.
    fn forget_before(&mut self, position: usize, policy: Policy) {
        let coded_at = self.coded_at(policy);
        let of_sinks = position.min(coded_at).max(self.first);
        if position <= coded_at {
            self.first = of_sinks;
            return;
        }
        let unit = match &self.coding {
            Coding::Blocks(set) => set.block_len(),
            _ => FORGOTTEN_TOGETHER,
        };
        // All of them at any time.
        let some = |n: usize, held: usize, unit: usize| if n == held { n } else { n / unit * unit };
        let n_coded = some((position - coded_at).min(self.n_coded), self.n_coded, unit);
        self.n_coded -= n_coded;
        self.first = coded_at + n_coded;
        if self.n_coded == 0 {
            let n_exact = position.min(self.n_tokens()).saturating_sub(self.first);
            self.first += some(n_exact, self.n_tokens() - self.first, FORGOTTEN_TOGETHER);
        }
    }
}

/// Tokens that are coded together, from position `first` on, become what is decoded.
fn code<E: Element>(coding: &Coding, tokens: &mut [Token<E>], first: usize) {
    for head in 0..HEADS {
        let mut x: Vec<E> = tokens.iter().flat_map(|token| token[head]).collect();
        match coding {
            Coding::Exact => {}
            Coding::Blocks(set) => {
                let (stream, mut scratch) = (&set.streams()[head], Scratch::default());
                let (back, forward) = set.frame(first).unzip();
                let mut packed = vec![0; stream.block_bytes()];
                let given = Tokens { data: &x, token_stride: DIM };
                stream
                    .encode_block(best_isa(), given, back.as_ref(), &mut packed, &mut scratch)
                    .expect("it fits");
                stream
                    .decode_block(best_isa(), &packed, forward.as_ref(), &mut x, &mut scratch)
                    .expect("it fits");
            }
            Coding::LowRank(coder) => {
                let mut coded = vec![0; coder.vector_bytes()];
                coder.encode(&x, &mut coded);
                coder.decode(&coded, &mut x);
            }
        }
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
    sides: [Side<E>; 2],
}

impl<E: Element> Pair<E> {
    fn new(source: &mut Source<'_>) -> Option<Self> {
        let sides = [(), ()].map(|()| source.below(CODINGS.len())).map(|at| CODINGS[at].clone());
        let policy = Policy {
            n_sinks: source.below(6),
            compress_start_len: source.below(50),
            n_tail: source.below(24),
        };
        let [key, value] = sides;
        let cache = LayerCache::new(key.clone(), value.clone(), policy, 1, HEADS, (DIM, DIM));
        let empty = |coding| Side { coding, rows: vec![Vec::new()], first: 0, n_coded: 0 };
        match cache {
            Ok(cache) => Some(Self { cache, policy, sides: [key, value].map(empty) }),
            Err(error) => {
                assert!(matches!(error, CacheError::BlockLen { .. }), "{error}");
                None
            }
        }
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

    /// As `forget_before`, then `compress`.
    fn slide(&mut self, position: usize) {
        self.cache.slide(position, 1).expect("what was taken can be coded");
        for side in &mut self.sides {
            side.forget_before(position, self.policy);
        }
        self.compressed();
    }

    fn compressed(&mut self) {
        assert!(!self.cache.is_due());
        let granularity = self.sides.iter().map(|side| side.coding.granularity()).max().unwrap_or(1);
        for side in &mut self.sides {
            side.compress(self.policy, granularity);
        }
    }

    /// Where both sides are held from.
    fn first(&self) -> usize {
        self.sides[0].first.max(self.sides[1].first)
    }

    /// A window slides on.
    fn forget_before(&mut self, position: usize) {
        self.cache.forget_before(position);
        for side in &mut self.sides {
            side.forget_before(position, self.policy);
        }
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

    fn check(&self, more_room: usize) {
        let (first, n, batch) = (self.first(), self.n_tokens(), self.batch());
        assert_eq!(self.cache.first(), first);
        let n_coded = self.sides.iter().map(|side| side.n_coded).max();
        assert_eq!(
            (self.cache.batch(), self.cache.n_tokens(), Some(self.cache.n_coded())),
            (batch, n, n_coded)
        );
        let (held, room) = (n - first, n - first + more_room);
        for (at, side) in self.sides.iter().enumerate() {
            let read = |tokens: Range<usize>, room: usize| {
                let mut got = vec![E::from_f32(7.0); batch * HEADS * room * DIM];
                let read = if at == 0 {
                    self.cache.read_keys(tokens, &mut got, room, 1)
                } else {
                    self.cache.read_values(tokens, &mut got, room, 1)
                };
                read.expect("there is room");
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
                    "side {at}, tokens {some:?} of {n}"
                );
            }
            for (head, got) in got.chunks_exact((room * DIM).max(1)).enumerate() {
                let expected = side.rows[head / HEADS][first..].iter().map(|token| token[head % HEADS]);
                for (token, (got, expected)) in got.chunks_exact(DIM).zip(expected).enumerate() {
                    // By bits: an exact side may hold NaN.
                    let same =
                        got.iter().zip(&expected).all(|(a, b)| a.to_f32().to_bits() == b.to_f32().to_bits());
                    assert!(same, "side {at}, head {head}, token {token} of {n}: {got:?} for {expected:?}");
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
            10 => {
                let position = source.below(pair.n_tokens() + 1);
                if source.any() { pair.forget_before(position) } else { pair.slide(position) }
            }
            11 | 12 => {
                let rows: Vec<usize> =
                    (0..source.below(MOST_ROWS + 1)).map(|_| source.below(MOST_ROWS)).collect();
                pair.select(&rows);
            }
            13 => copy = pair.copy(),
            14 => std::mem::swap(&mut pair, &mut copy),
            _ => pair = empty.copy(),
        }
        pair.check(source.below(3));
    }
    copy.check(0);
}
