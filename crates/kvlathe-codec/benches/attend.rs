//! Attention's two products with packed blocks, by instruction set and number of queries that share a KV head.
//!
//! An item is a token: one key scored, or one value added up, for all queries.

use divan::counter::ItemsCount;
use kvlathe_codec::{
    Basis, CoefficientSums, Isa, Pairing, Queries, Rope, Scratch, StreamTables, Tokens, Width,
    available_isas, weigh,
};

const HEAD_DIM: usize = 64;
const BLOCK_LEN: usize = 32;
const N_BLOCKS: usize = 32;

fn main() {
    divan::main();
}

/// About three bits a value, as the allocation gives it.
fn packed_block() -> (StreamTables, Vec<u8>, Rope) {
    let mut synthesis = vec![0.0; HEAD_DIM * HEAD_DIM];
    for i in 0..HEAD_DIM {
        for j in 0..HEAD_DIM {
            synthesis[i * HEAD_DIM + j] = ((i * 31 + j * 17) as f32).sin() + if i == j { 8.0 } else { 0.0 };
        }
    }
    let widths = (0..HEAD_DIM)
        .map(|i| match i {
            0..4 => Width::W8,
            4..34 => Width::W4,
            34..50 => Width::W2,
            _ => Width::W0,
        })
        .collect();
    let basis = Basis { mean: vec![0.1; HEAD_DIM], synthesis, importance: vec![1.0; HEAD_DIM], widths };
    let inv_freq = (0..HEAD_DIM / 2).map(|i| 0.7f64.powi(i as i32)).collect();
    let rope = Rope::new(Pairing::HalfSplit, HEAD_DIM, inv_freq).expect("a valid rope");
    let tables = StreamTables::new(&basis, Some(&rope), BLOCK_LEN).expect("a valid basis");
    let x: Vec<f32> = (0..BLOCK_LEN * HEAD_DIM).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let mut packed = vec![0; tables.block_bytes()];
    let tokens = Tokens { data: &x[..], token_stride: HEAD_DIM };
    tables
        .encode_block(Isa::Portable, tokens, None, &mut packed, &mut Scratch::default())
        .expect("finite input");
    (tables, packed, rope)
}

const CASES: [(&str, usize); 9] = [
    ("avx2", 1),
    ("avx2", 3),
    ("avx2", 7),
    ("avx512", 1),
    ("avx512", 3),
    ("avx512", 7),
    ("avx512vnni", 1),
    ("avx512vnni", 3),
    ("avx512vnni", 7),
];

fn isa_named(name: &str) -> Option<Isa> {
    available_isas().into_iter().find(|isa| isa.name() == name)
}

#[divan::bench(args = CASES)]
fn score(bencher: divan::Bencher<'_, '_>, (isa, n_queries): (&str, usize)) {
    let Some(isa) = isa_named(isa) else { return };
    let (tables, packed, rope) = packed_block();
    let copies = vec![packed; N_BLOCKS];
    let blocks: Vec<&[u8]> = copies.iter().map(Vec::as_slice).collect();
    let mut queries = Queries::default();
    queries.set(&tables, &vec![0.3; n_queries * HEAD_DIM]);
    let mut scores = vec![0.0; n_queries * N_BLOCKS * BLOCK_LEN];
    let (walk, mut scratch) = (rope.walk_back(1000, BLOCK_LEN as i64), Scratch::default());
    bencher.counter(ItemsCount::new(N_BLOCKS * BLOCK_LEN)).bench_local(|| {
        tables.score_blocks(isa, &blocks, Some(walk.clone()), &queries, &[], &mut scores, &mut scratch)
    });
}

#[divan::bench(args = CASES)]
fn softmax(bencher: divan::Bencher<'_, '_>, (isa, n_queries): (&str, usize)) {
    let Some(isa) = isa_named(isa) else { return };
    let mut scores = vec![-0.1; n_queries * N_BLOCKS * BLOCK_LEN];
    let (mut max, mut sum, mut rescale) = (vec![0.0; n_queries], vec![0.0; n_queries], vec![0.0; n_queries]);
    bencher.counter(ItemsCount::new(N_BLOCKS * BLOCK_LEN)).bench_local(|| {
        weigh(isa, &mut scores, N_BLOCKS * BLOCK_LEN, &mut max, &mut sum, &mut rescale);
    });
}

#[divan::bench(args = CASES)]
fn accumulate(bencher: divan::Bencher<'_, '_>, (isa, n_queries): (&str, usize)) {
    let Some(isa) = isa_named(isa) else { return };
    let (tables, packed, _) = packed_block();
    let copies = vec![packed; N_BLOCKS];
    let blocks: Vec<&[u8]> = copies.iter().map(Vec::as_slice).collect();
    let weights = vec![0.01; n_queries * N_BLOCKS * BLOCK_LEN];
    let (mut sums, mut scratch) = (CoefficientSums::new(&tables, n_queries), Scratch::default());
    bencher
        .counter(ItemsCount::new(N_BLOCKS * BLOCK_LEN))
        .bench_local(|| tables.accumulate_blocks(isa, &blocks, &weights, &mut sums, &mut scratch));
}
