//! How many tokens a second one core encodes and decodes, by instruction set.
//!
//! A "token" here is one stream's vector; a model has layers × KV heads × 2 of them a token.

use divan::counter::ItemsCount;
use kvlathe_codec::{Basis, Isa, Scratch, StreamTables, Tokens, Width, available_isas};

const HEAD_DIM: usize = 64;
const BLOCK_LEN: usize = 32;

fn main() {
    divan::main();
}

/// About three bits a value, as the allocation gives it.
fn three_bit_tables() -> StreamTables {
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
    StreamTables::new(&basis, None, BLOCK_LEN).expect("a valid basis")
}

fn activations() -> Vec<f32> {
    (0..BLOCK_LEN * HEAD_DIM).map(|i| (i as f32 * 0.37).sin() * 3.0).collect()
}

fn isa_named(name: &str) -> Option<Isa> {
    available_isas().into_iter().find(|isa| isa.name() == name)
}

#[divan::bench(args = ["portable", "avx2", "avx512"])]
fn encode_block(bencher: divan::Bencher<'_, '_>, isa: &str) {
    let Some(isa) = isa_named(isa) else { return };
    let (tables, x) = (three_bit_tables(), activations());
    let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
    bencher.counter(ItemsCount::new(BLOCK_LEN)).bench_local(|| {
        let tokens = Tokens { data: &x[..], token_stride: HEAD_DIM };
        tables.encode_block(isa, tokens, None, &mut packed, &mut scratch)
    });
}

#[divan::bench(args = ["portable", "avx2", "avx512"])]
fn decode_block(bencher: divan::Bencher<'_, '_>, isa: &str) {
    let Some(isa) = isa_named(isa) else { return };
    let (tables, x) = (three_bit_tables(), activations());
    let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
    let tokens = Tokens { data: &x[..], token_stride: HEAD_DIM };
    tables.encode_block(isa, tokens, None, &mut packed, &mut scratch).expect("finite input");
    let mut out = vec![0.0f32; x.len()];
    bencher
        .counter(ItemsCount::new(BLOCK_LEN))
        .bench_local(|| tables.decode_block(isa, &packed, None, &mut out, &mut scratch));
}
