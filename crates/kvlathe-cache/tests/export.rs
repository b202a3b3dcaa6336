//! Blocks as values: out of one layer and into another, which then is the same to the last bit.

use std::num::NonZeroUsize;
use std::sync::Arc;

use kvlathe_cache::{
    AttentionOptions, Block, BlockMismatch, Bytes, CacheError, Coding, LayerCache, Policy, SideParts,
    TensorView,
};
use kvlathe_codec::{Basis, Digest, Pairing, Rope, Side, StreamId, StreamSet, WIDTHS};

const HEADS: usize = 2;
const DIM: usize = 16;
const BLOCK_LEN: usize = 16;
const LAYER: usize = 5;

fn digest() -> Digest {
    Digest::from([7; 32])
}

fn coding(side: Side) -> Coding {
    let inv_freq = (0..DIM / 2).map(|i| 0.5f64.powi(i as i32)).collect();
    let rope = (side == Side::Key).then(|| Arc::new(Rope::new(Pairing::HalfSplit, DIM, inv_freq).unwrap()));
    let bases = [0.1, -0.2].map(|mean| Basis {
        mean: vec![mean; DIM],
        synthesis: (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.02 }).collect(),
        importance: vec![1.0; DIM],
        widths: (0..DIM).map(|i| WIDTHS[5 - i % 6]).collect(),
    });
    let id = StreamId { digest: digest(), layer: LAYER, side };
    Coding::Blocks(Arc::new(StreamSet::new(&bases, rope, BLOCK_LEN).unwrap().with_id(id)))
}

fn wave(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed * 131) as f32 * 0.61).sin() * (1 + i / DIM % 5) as f32).collect()
}

fn empty(policy: Policy, batch: usize) -> LayerCache<f32> {
    LayerCache::new(coding(Side::Key), coding(Side::Value), policy, batch, HEADS, (DIM, DIM)).unwrap()
}

fn append(layer: &mut LayerCache<f32>, n_tokens: usize, seed: usize) {
    let shape = [layer.batch(), HEADS, n_tokens, DIM];
    let [keys, values] = [seed, seed + 1].map(|seed| wave(shape.iter().product(), seed));
    let [keys, values] = [&keys, &values].map(|x| TensorView::contiguous(x, shape).unwrap());
    layer.append(keys, values).unwrap();
}

/// A layer's contents as values, exact tokens copied.
struct Exported {
    batch: usize,
    first: [usize; 2],
    sinks: [Vec<f32>; 2],
    blocks: [Vec<Vec<Block>>; 2],
    tail: [Vec<f32>; 2],
}

fn exported(layer: &LayerCache<f32>) -> Exported {
    let sides = Side::ALL.map(|side| layer.export_side(side).unwrap());
    Exported {
        batch: layer.batch(),
        first: sides.each_ref().map(|side| side.first),
        sinks: sides.each_ref().map(|side| side.sinks.data().to_vec()),
        blocks: sides.each_ref().map(|side| side.blocks.clone()),
        tail: sides.each_ref().map(|side| side.tail.data().to_vec()),
    }
}

impl Exported {
    fn side(&self, at: usize) -> SideParts<'_, f32> {
        let view = |x| {
            let x: &Vec<f32> = x;
            let n_tokens = x.len() / (self.batch * HEADS * DIM);
            TensorView::contiguous(x, [self.batch, HEADS, n_tokens, DIM]).unwrap()
        };
        let (sinks, tail) = (view(&self.sinks[at]), view(&self.tail[at]));
        SideParts { first: self.first[at], sinks, blocks: &self.blocks[at], tail }
    }

    fn import(&self, policy: Policy) -> Result<LayerCache<f32>, CacheError> {
        let mut layer = empty(policy, self.batch);
        let done = layer.import(self.side(0), self.side(1));
        if let Err(error) = done {
            let memory = layer.memory_use();
            assert_eq!((layer.n_tokens(), memory.coded_bytes, memory.exact_bytes), (0, 0, 0), "{error}");
            return Err(error);
        }
        Ok(layer)
    }
}

/// Keys, values, and what some queries find, by bits.
fn contents(layer: &LayerCache<f32>) -> Vec<u32> {
    let tokens = layer.first()..layer.n_tokens();
    let mut all = vec![0.0; layer.batch() * HEADS * tokens.len() * DIM];
    let mut bits = Vec::new();
    layer.read(Side::Key, tokens.clone(), &mut all, tokens.len(), 1).unwrap();
    bits.extend(all.iter().map(|v| v.to_bits()));
    layer.read(Side::Value, tokens.clone(), &mut all, tokens.len(), 1).unwrap();
    bits.extend(all.iter().map(|v| v.to_bits()));
    for n_queries in [1, 30] {
        let shape = [layer.batch(), 2 * HEADS, n_queries.min(layer.n_tokens()), DIM];
        let queries = wave(shape.iter().product(), 9);
        let mut out = vec![0.0; queries.len()];
        let mut lse = vec![0.0; queries.len() / DIM];
        let view = TensorView::contiguous(&queries, shape).unwrap();
        match layer.attend(view, AttentionOptions::default(), &mut out, Some(&mut lse), 1) {
            Ok(()) => bits.extend(out.iter().chain(&lse).map(|v| v.to_bits())),
            // Behind a window only queries that have just come may ask.
            Err(error) => assert!(layer.policy().window.is_some(), "{error}"),
        }
    }
    bits
}

/// Before any block, in the first one, behind many; with more sinks than a block has tokens; behind a window.
#[test]
fn an_imported_layer_is_the_same_and_goes_on_the_same() {
    let plain = Policy { n_sinks: 4, n_tail: 10, ..Policy::default() };
    for policy in [
        plain,
        Policy { n_sinks: 0, ..plain },
        Policy { n_sinks: 2 * BLOCK_LEN + 3, ..plain },
        Policy { window: NonZeroUsize::new(70), ..plain },
        Policy { window: NonZeroUsize::new(9), ..plain },
    ] {
        for n_tokens in [2, 4, 20, 30, 63, 300] {
            let mut one = empty(policy, 2);
            append(&mut one, n_tokens, 1);
            one.settle(1).unwrap();
            let mut other = exported(&one).import(policy).unwrap();
            assert_eq!(contents(&other), contents(&one), "{policy:?}, {n_tokens} tokens");
            let memory = other.memory_use();
            assert_eq!((memory.coded_bytes, one.memory_use().foreign_bytes), (memory.foreign_bytes, 0));
            for (step, n_new) in [1, 40, 3].into_iter().enumerate() {
                for layer in [&mut one, &mut other] {
                    append(layer, n_new, 10 + step);
                }
                assert_eq!(contents(&other), contents(&one), "{policy:?}, {n_tokens} tokens, step {step}");
                for layer in [&mut one, &mut other] {
                    layer.settle(1).unwrap();
                }
                assert_eq!(contents(&other), contents(&one), "{policy:?}, {n_tokens} tokens, step {step}");
            }
            if policy.window.is_none() {
                // Down into the first block, among its sinks, and up again.
                for (n_left, n_new) in [(11, 60), (3, 50)] {
                    for layer in [&mut one, &mut other] {
                        layer.crop(layer.n_tokens() - n_left).unwrap();
                        append(layer, n_new, 20);
                        layer.settle(1).unwrap();
                    }
                    assert_eq!(
                        contents(&other),
                        contents(&one),
                        "{policy:?}, {n_tokens} tokens, {n_left} left"
                    );
                }
            }
        }
    }
}

/// A coded side forgets whole blocks, an exact one tokens: behind a window they begin at different positions.
#[test]
fn sides_that_begin_at_different_positions_leave_their_layer() {
    let policy = Policy { n_sinks: 4, window: NonZeroUsize::new(35), ..Policy::default() };
    for (key, value) in [(coding(Side::Key), Coding::Exact), (Coding::Exact, coding(Side::Value))] {
        let new =
            || LayerCache::<f32>::new(key.clone(), value.clone(), policy, 1, HEADS, (DIM, DIM)).unwrap();
        let mut one = new();
        append(&mut one, 95, 1);
        one.settle(1).unwrap();
        let sides = Side::ALL.map(|side| one.export_side(side).unwrap());
        assert_ne!(sides[0].first, sides[1].first);
        let mut other = new();
        other.import(sides[0].as_parts(), sides[1].as_parts()).unwrap();
        assert_eq!(Side::ALL.map(|side| other.export_side(side).unwrap()), sides);
    }
}

#[test]
fn blocks_say_where_they_stand() {
    let policy = Policy { n_sinks: 4, ..Policy::default() };
    let mut layer = empty(policy, 1);
    append(&mut layer, 4 * BLOCK_LEN + 3, 1);
    layer.compress(1).unwrap();
    for side in Side::ALL {
        let blocks = layer.export(0, side).unwrap();
        let places: Vec<usize> = blocks.iter().map(|block| block.first_position).collect();
        assert_eq!(places, [0, 16, 32, 48], "multiples of the block's length, whatever is exact");
        assert!(blocks.iter().all(|b| b.id == StreamId { digest: digest(), layer: LAYER, side }));
        let set = match coding(side) {
            Coding::Blocks(set) => set,
            Coding::Exact => unreachable!(),
        };
        assert!(blocks.iter().all(|block| block.bytes.len() == set.block_bytes()));
        // Nothing was copied.
        let again = layer.export(0, side).unwrap();
        assert_eq!(again[1].bytes.as_ptr(), blocks[1].bytes.as_ptr());
    }
    let positions = layer.positions(Side::Key);
    assert_eq!((positions.first, positions.coded_at, positions.tail_at, positions.end), (0, 4, 64, 67));
    assert_eq!(layer.export(1, Side::Key), Err(CacheError::Row { given: 1, rows: 1 }));
}

/// Blocks of one sequence under the sinks of another: a block depends on its own tokens only.
#[test]
fn a_block_is_the_same_in_every_cache() {
    let policy = Policy { n_sinks: 4, ..Policy::default() };
    let (mut one, mut other) = (empty(policy, 1), empty(Policy { n_tail: 7, ..policy }, 1));
    append(&mut one, 100, 1);
    one.compress(1).unwrap();
    // The same tokens a few at a time.
    let shape = [1, HEADS, 100, DIM];
    let [keys, values] = [1, 2].map(|seed| wave(shape.iter().product(), seed));
    for first in (0..100).step_by(9) {
        let n_new = 9.min(100 - first);
        let [keys, values] = [&keys, &values].map(|x| {
            TensorView::new(&x[first * DIM..], [1, HEADS, n_new, DIM], [0, 100 * DIM, DIM]).unwrap()
        });
        other.append(keys, values).unwrap();
        other.compress(1).unwrap();
    }
    for side in Side::ALL {
        let (ours, theirs) = (one.export(0, side).unwrap(), other.export(0, side).unwrap());
        assert!(!theirs.is_empty());
        assert_eq!(ours[..theirs.len()], theirs);
    }
}

#[test]
fn what_does_not_belong_is_refused() {
    let policy = Policy { n_sinks: 4, n_tail: 5, ..Policy::default() };
    let mut layer = empty(policy, 2);
    append(&mut layer, 100, 1);
    layer.compress(1).unwrap();
    let sound = || exported(&layer);
    sound().import(policy).unwrap();
    let broken = |change: &dyn Fn(&mut Exported)| {
        let mut parts = sound();
        change(&mut parts);
        parts.import(policy).err().expect("refused")
    };
    let block = |change: &dyn Fn(&mut Block)| broken(&|parts| change(&mut parts.blocks[1][1][2]));
    let wrong = |mismatch| CacheError::WrongBlock { row: 1, index: 2, mismatch };

    let other = Digest::from([8; 32]);
    let expected = digest();
    assert_eq!(
        block(&|block| block.id.digest = other),
        wrong(BlockMismatch::Digest { given: other, expected })
    );
    assert_eq!(block(&|block| block.id.layer = 6), wrong(BlockMismatch::Layer { given: 6, expected: LAYER }));
    let (given, expected) = (Side::Key, Side::Value);
    assert_eq!(block(&|block| block.id.side = Side::Key), wrong(BlockMismatch::Side { given, expected }));
    assert_eq!(
        block(&|block| block.first_position = 33),
        wrong(BlockMismatch::Position { given: 33, expected: 32 })
    );
    let n_bytes = sound().blocks[1][1][2].bytes.len();
    for given in [0, n_bytes - 1, n_bytes + 1] {
        let expected = n_bytes;
        assert_eq!(
            block(&|block| block.bytes = Bytes::from(vec![0; given])),
            wrong(BlockMismatch::Length { given, expected })
        );
    }
    // Out of order, a gap, one too few, a row too few, another number of tokens.
    for change in [
        (&|parts: &mut Exported| parts.blocks[0][0].swap(0, 1)) as &dyn Fn(&mut Exported),
        &|parts| drop(parts.blocks[0][1].remove(2)),
        &|parts| parts.blocks[1].iter_mut().for_each(|blocks| drop(blocks.pop())),
        &|parts| drop(parts.blocks[0].pop()),
        &|parts| parts.tail[0].truncate(2 * HEADS * 3 * DIM),
        &|parts| parts.sinks = [Vec::new(), Vec::new()],
        &|parts| parts.first = [4, 4],
        &|parts| parts.first = [usize::MAX, usize::MAX],
    ] {
        let error = broken(change);
        assert!(
            matches!(
                error,
                CacheError::WrongBlock { .. } | CacheError::Shape { .. } | CacheError::Forgotten { .. }
            ),
            "{error}"
        );
    }
    let nan = broken(&|parts| parts.tail[1][3] = f32::NAN);
    assert!(nan.to_string().contains("the model's values are broken"), "{nan}");

    // Any bytes of the right length are a block.
    let mut garbage = sound();
    garbage.blocks[0][0][3].bytes = Bytes::from_owner(vec![0xa5; n_bytes]);
    garbage.import(policy).unwrap();

    let mut full = sound().import(policy).unwrap();
    let parts = sound();
    assert_eq!(full.import(parts.side(0), parts.side(1)), Err(CacheError::NotEmpty { n_tokens: 100 }));
    // A codec without a name cannot say which blocks are its own.
    let nameless = || {
        let basis = Basis {
            mean: vec![0.0; DIM],
            synthesis: (0..DIM * DIM).map(|i| f32::from(u8::from(i % (DIM + 1) == 0))).collect(),
            importance: vec![1.0; DIM],
            widths: vec![WIDTHS[0]; DIM],
        };
        Coding::Blocks(Arc::new(StreamSet::new(&[basis.clone(), basis], None, BLOCK_LEN).unwrap()))
    };
    let mut layer = LayerCache::<f32>::new(nameless(), nameless(), policy, 1, HEADS, (DIM, DIM)).unwrap();
    append(&mut layer, 100, 1);
    layer.compress(1).unwrap();
    assert_eq!(layer.export(0, Side::Key), Err(CacheError::Unnamed));
}
