//! The cache against a plain model of itself: a list of tokens, some of them approximate.

use std::sync::Arc;

use half::bf16;
use kvlathe_cache::{CacheError, Coding, LayerCache, Policy, TensorView};
use kvlathe_codec::{Basis, LowRank, Pairing, Rope, Storage, StreamSet, Width};
use proptest::prelude::*;

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

fn low_rank() -> Coding {
    let u: Vec<f32> = (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.0 }).collect();
    Coding::LowRank(Arc::new(LowRank::new(&u, &[0.5; DIM], DIM, Storage::Int8).unwrap()))
}

/// The value of component `j` of token number `serial` of a head: unlike all others.
fn component(serial: usize, head: usize, j: usize) -> f32 {
    ((serial * 131 + head * 17 + j * 7) as f32 * 0.61).sin() * (1.0 + (serial % 5) as f32)
}

fn tensor(rows: &[Vec<usize>]) -> Vec<f32> {
    let mut data = Vec::new();
    for row in rows {
        for head in 0..HEADS {
            for &serial in row {
                data.extend((0..DIM).map(|j| component(serial, head, j)));
            }
        }
    }
    data
}

fn check(cache: &LayerCache<f32>, model: &[Vec<usize>], policy: Policy, tolerance: f32) {
    let n = model[0].len();
    assert_eq!((cache.batch(), cache.n_tokens()), (model.len(), n));
    let mut got = vec![f32::NAN; model.len() * HEADS * n * DIM];
    for side in 0..2 {
        if side == 0 { cache.read_keys(&mut got, n) } else { cache.read_values(&mut got, n) }.unwrap();
        let expected = tensor(model);
        for (at, (a, b)) in got.iter().zip(&expected).enumerate() {
            let token = at / DIM % n;
            assert!((a - b).abs() <= tolerance, "side {side} token {token} of {n}: {a} for {b}");
            if token < policy.n_sinks.min(n) {
                assert_eq!(a, b, "sinks are exact");
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    Crop(usize),
    Select(Vec<usize>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..40).prop_map(Step::Append),
        2 => (0usize..30).prop_map(Step::Crop),
        1 => proptest::collection::vec(0usize..4, 1..4).prop_map(Step::Select),
    ];
    proptest::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_sequence_of_operations(
        steps in steps(), n_sinks in 0usize..6, start in 0usize..50, n_tail in 0usize..20, kind in 0usize..4,
    ) {
        let policy = Policy { n_sinks, compress_start_len: start, n_tail };
        let (key, value, tolerance) = match kind {
            0 => (Coding::Exact, Coding::Exact, 0.0),
            1 => (blocks(true), blocks(false), 0.3),
            2 => (Coding::Exact, low_rank(), 0.1),
            _ => (blocks(true), low_rank(), 0.3),
        };
        let mut cache = LayerCache::<f32>::new(key, value, policy, 2, HEADS, (DIM, DIM)).unwrap();
        let mut model: Vec<Vec<usize>> = vec![Vec::new(); 2];
        let mut serial = 0;
        for step in steps {
            match step {
                Step::Append(n) => {
                    let new: Vec<Vec<usize>> = (0..model.len()).map(|r| (0..n).map(|t| serial + r * n + t).collect()).collect();
                    serial += n * model.len();
                    let data = tensor(&new);
                    let view = TensorView::contiguous(&data, [model.len(), HEADS, n, DIM]).unwrap();
                    let coded_before = cache.n_coded();
                    cache.append(view, view).unwrap();
                    cache.compress().unwrap();
                    model.iter_mut().zip(new).for_each(|(row, new)| row.extend(new));
                    let coded = cache.n_coded();
                    let spare = model[0].len().saturating_sub(n_sinks + n_tail);
                    prop_assert!(coded <= spare.max(coded_before), "the tail stays exact");
                    if kind != 0 && model[0].len() > start {
                        prop_assert!(spare < coded + BLOCK_LEN, "whole blocks leave the tail");
                    }
                }
                Step::Crop(n) => {
                    let held = model[0].len();
                    if n > held {
                        prop_assert_eq!(cache.crop(n), Err(CacheError::Crop { given: n, held }));
                    } else {
                        cache.crop(n).unwrap();
                        model.iter_mut().for_each(|row| row.truncate(held - n));
                    }
                }
                Step::Select(rows) => {
                    if rows.iter().any(|&r| r >= model.len()) {
                        prop_assert!(cache.select(&rows).is_err());
                    } else {
                        cache.select(&rows).unwrap();
                        model = rows.iter().map(|&r| model[r].clone()).collect();
                    }
                }
            }
            check(&cache, &model, policy, tolerance);
        }
    }
}

#[test]
fn packed_memory_is_what_the_widths_say() {
    let policy = Policy { n_sinks: 4, compress_start_len: 0, n_tail: 16 };
    let mut cache =
        LayerCache::<bf16>::new(blocks(true), blocks(false), policy, 1, HEADS, (DIM, DIM)).unwrap();
    let n = 4 + 16 + 100 * BLOCK_LEN;
    let data: Vec<bf16> = (0..HEADS * n * DIM).map(|i| bf16::from_f32((i as f32).sin())).collect();
    let view = TensorView::contiguous(&data, [1, HEADS, n, DIM]).unwrap();
    cache.append(view, view).unwrap();
    cache.compress().unwrap();
    assert_eq!(cache.n_coded(), 100 * BLOCK_LEN);
    let memory = cache.memory_use();
    // 8 tokens × (8 components × 8 bits + 16 bits) × 2 heads = 160 bytes, padded to 192, plus 40 of bookkeeping.
    assert_eq!(memory.coded_bytes, 2 * 100 * (192 + 40));
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
    let policy = Policy { n_sinks: 0, compress_start_len: 0, n_tail: 0 };
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
    assert!(wrong(Coding::Exact, low_rank(), HEADS, 16).contains("head_dim is 16"));
}
