//! What a layer's cache counts and refuses. Sequences of operations are compared with a model in `fuzz/src/layer_cache.rs`.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use kvlathe_cache::{CacheError, Coding, LayerCache, Policy, TensorView};
use kvlathe_codec::{Basis, Pairing, Rope, Side, StreamSet, Width};

const HEADS: usize = 2;
const DIM: usize = 8;
const BLOCK_LEN: usize = 8;

fn eight_bit_basis(mean: f32) -> Basis {
    let synthesis = (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.0 }).collect();
    Basis { mean: vec![mean; DIM], synthesis, importance: vec![1.0; DIM], widths: vec![Width::W8; DIM] }
}

fn blocks(rope: bool) -> Coding {
    let rope =
        rope.then(|| Arc::new(Rope::new(Pairing::HalfSplit, DIM, vec![1.0, 0.1, 0.01, 0.001]).unwrap()));
    Coding::Blocks(Arc::new(
        StreamSet::new(&[eight_bit_basis(0.1), eight_bit_basis(-0.2)], rope, BLOCK_LEN).unwrap(),
    ))
}

#[test]
fn packed_memory_is_what_the_widths_say() {
    let policy = Policy { n_sinks: 4, n_tail: 16, ..Policy::default() };
    let mut cache =
        LayerCache::<bf16>::new(blocks(true), blocks(false), policy, 1, HEADS, (DIM, DIM)).unwrap();
    let n = 4 + 16 + 100 * BLOCK_LEN;
    let data: Vec<bf16> = (0..HEADS * n * DIM).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let view = TensorView::contiguous(&data, [1, HEADS, n, DIM]).unwrap();
    cache.append(view, view).unwrap();
    cache.compress(1).unwrap();
    // The first block begins with the sinks' places.
    assert_eq!(cache.n_coded(), 100 * BLOCK_LEN - 4);
    let memory = cache.memory_use();
    // 8 tokens × (8 components × 8 bits + 16 bits) × 2 heads = 160 bytes, padded to 192, plus 72 of bookkeeping.
    assert_eq!(memory.coded_bytes, 2 * 100 * (192 + 72));
    assert!(
        memory.exact_bytes <= 2 * HEADS * DIM * 2 * (4 + 16 + 64),
        "the exact copy of the prompt is gone"
    );

    // Four beams that share their past cost their tails, not their blocks.
    let alone = cache.memory_use();
    cache.select(&[0, 0, 0, 0]).unwrap();
    assert_eq!(cache.memory_use().coded_bytes, alone.coded_bytes);
}

#[test]
fn refused_input_changes_nothing() {
    let policy = Policy::default();
    let mut cache =
        LayerCache::<f32>::new(blocks(false), Coding::Exact, policy, 1, HEADS, (DIM, DIM)).unwrap();
    let mut data = vec![1.0f32; HEADS * 3 * DIM];
    let shape = [1, HEADS, 3, DIM];
    cache
        .append(TensorView::contiguous(&data, shape).unwrap(), TensorView::contiguous(&data, shape).unwrap())
        .unwrap();
    data[DIM * 4] = f32::INFINITY;
    let bad = TensorView::contiguous(&data, shape).unwrap();
    let message = cache.append(bad, bad).unwrap_err().to_string();
    assert!(message.contains("token 1 of KV head 1") && message.contains("keys"), "{message}");
    let other_batch = TensorView::contiguous(&data[..0], [2, HEADS, 0, DIM]).unwrap();
    assert!(cache.append(other_batch, other_batch).unwrap_err().to_string().contains("batch size is 2"));
    assert_eq!(cache.n_tokens(), 3);
    assert!(TensorView::contiguous(&data, [1, HEADS, 4, DIM]).is_err(), "a view may not run past its buffer");
    // Nor may a size or a stride be so large that its product is none.
    for (shape, strides) in [
        ([1, 2, 1, DIM], [0, usize::MAX, 0]),
        ([2, 2, 1, DIM], [usize::MAX / 2, usize::MAX / 2, 0]),
        ([3, 1, 1, usize::MAX], [1, 0, 0]),
    ] {
        assert!(TensorView::new(&data, shape, strides).is_err(), "{shape:?} {strides:?}");
    }
    assert!(TensorView::contiguous(&data, [2, usize::MAX / 4, 4, DIM]).is_err());
}

#[test]
fn codecs_of_another_model_are_refused() {
    let wrong = |key, value, heads, dim| {
        LayerCache::<f32>::new(key, value, Policy::default(), 1, heads, (dim, dim))
            .err()
            .expect("refused")
            .to_string()
    };
    assert!(wrong(blocks(false), Coding::Exact, 3, DIM).contains("KV heads is 3"));
    assert!(wrong(Coding::Exact, blocks(false), HEADS, 16).contains("head_dim is 16"));
}

#[test]
fn any_run_of_tokens_can_be_read_alone() {
    let policy = Policy { n_sinks: 3, n_tail: 4, ..Policy::default() };
    let n = 3 + 2 * BLOCK_LEN + 6;
    for (key, value) in [(blocks(true), blocks(false)), (blocks(true), Coding::Exact)] {
        let mut cache = LayerCache::<f32>::new(key, value, policy, 2, HEADS, (DIM, DIM)).unwrap();
        let data: Vec<f32> = (0..2 * HEADS * n * DIM).map(|i| (i as f32 * 0.7).sin()).collect();
        let view = TensorView::contiguous(&data, [2, HEADS, n, DIM]).unwrap();
        cache.append(view, view).unwrap();
        cache.compress(3).unwrap();
        assert!(cache.n_coded() > 0);
        let read = |tokens: Range<usize>, n_threads: usize| {
            let mut keys = vec![0.0; 2 * HEADS * tokens.len() * DIM];
            let mut values = keys.clone();
            cache.read(Side::Key, tokens.clone(), &mut keys, tokens.len(), n_threads).unwrap();
            cache.read(Side::Value, tokens.clone(), &mut values, tokens.len(), n_threads).unwrap();
            [keys, values]
        };
        let all = read(0..n, 3);
        for start in 0..=n {
            for end in start..=n {
                for (got, all) in read(start..end, 1).iter().zip(&all) {
                    let heads = all.chunks_exact(n * DIM).map(|head| &head[start * DIM..end * DIM]);
                    assert!(got.iter().eq(heads.flatten()), "tokens {start}..{end}");
                }
            }
        }
        let mut out = vec![0.0; 2 * HEADS * DIM];
        let error = cache.read(Side::Key, n..n + 1, &mut out, 1, 1).unwrap_err();
        assert!(error.to_string().contains(&(n + 1).to_string()), "{error}");
    }
}

/// A sliding window: what is still held reads the same as without forgetting, and does not grow.
#[test]
fn what_has_left_a_window_is_dropped() {
    let (n_past, step) = (60, 7);
    let policy =
        Policy { n_sinks: 4, n_tail: 16, window: NonZeroUsize::new(n_past + 1), ..Policy::default() };
    for coding in [Coding::Exact, blocks(true)] {
        let new =
            || LayerCache::<f32>::new(coding.clone(), coding.clone(), policy, 1, HEADS, (DIM, DIM)).unwrap();
        let (mut all, mut cache, mut most_bytes) = (new(), new(), [0, 0]);
        for at in 0..100 {
            let data: Vec<f32> = (0..HEADS * step * DIM).map(|i| ((at * 31 + i) as f32).sin()).collect();
            let view = TensorView::contiguous(&data, [1, HEADS, step, DIM]).unwrap();
            let first = (all.n_tokens() + step).saturating_sub(n_past);
            all.append(view, view).unwrap();
            all.compress(1).unwrap();
            cache.append(view, view).unwrap();
            cache.settle(1).unwrap();
            assert!(!cache.would_settle());
            assert_eq!(cache.n_tokens(), all.n_tokens());
            assert!(cache.first() <= first && first - cache.first() < 16, "{} for {first}", cache.first());
            let read = |cache: &LayerCache<f32>| {
                let n_tokens = all.n_tokens() - first;
                let mut out = vec![0.0; HEADS * n_tokens * DIM];
                cache.read(Side::Key, first..all.n_tokens(), &mut out, n_tokens, 1).unwrap();
                out
            };
            assert_eq!(read(&cache), read(&all));
            let memory = cache.memory_use();
            let half = usize::from(at >= 50);
            most_bytes[half] = most_bytes[half].max(memory.exact_bytes + memory.coded_bytes);
        }
        assert!(most_bytes[1] <= most_bytes[0], "{coding:?}: {most_bytes:?}");

        // What leaves at once is not coded before.
        let mut at_once = new();
        let view = TensorView::contiguous(&[0.5; HEADS * 500 * DIM], [1, HEADS, 500, DIM]).unwrap();
        at_once.append(view, view).unwrap();
        at_once.settle(1).unwrap();
        assert!(at_once.first() <= 500 - n_past && 500 - n_past - at_once.first() < 16);
        assert_eq!(at_once.n_coded() > 0, !matches!(coding, Coding::Exact));

        let (first, held) = (cache.first(), cache.n_tokens() - cache.first());
        let mut out = vec![0.0; HEADS * 700 * DIM];
        let wanted = first - 1;
        assert_eq!(
            cache.read(Side::Key, wanted..700, &mut out, 700, 1),
            Err(CacheError::Forgotten { wanted, first })
        );
        assert_eq!(cache.crop(held + 1), Err(CacheError::Crop { given: held + 1, held }));
        cache.crop(held).unwrap();
        assert_eq!((cache.n_tokens(), cache.n_coded()), (first, 0));
        // No new sinks: those of the sequence are gone.
        let view = TensorView::contiguous(&out[..HEADS * 40 * DIM], [1, HEADS, 40, DIM]).unwrap();
        cache.append(view, view).unwrap();
        cache.compress(1).unwrap();
        assert_eq!(cache.n_coded(), if matches!(coding, Coding::Exact) { 0 } else { 24 });
    }
}
