//! How many tokens a second one core encodes and decodes, by instruction set.
//!
//! A "token" here is one stream's vector; a model has layers × KV heads × 2 of them a token.

mod three_bits;

use divan::counter::ItemsCount;
use kvlathe_codec::{Isa, Scratch, StreamTables, Tokens, available_isas};
use three_bits::{BLOCK_LEN, HEAD_DIM, activations, basis};

fn main() {
    divan::main();
}

fn three_bit_tables() -> StreamTables {
    StreamTables::new(&basis(), None, BLOCK_LEN).expect("a valid basis")
}

fn isa_named(name: &str) -> Option<Isa> {
    available_isas().into_iter().find(|isa| isa.name() == name)
}

#[divan::bench(args = ["portable", "neon", "avx2", "avx512"])]
fn encode_block(bencher: divan::Bencher<'_, '_>, isa: &str) {
    let Some(isa) = isa_named(isa) else { return };
    let (tables, x) = (three_bit_tables(), activations());
    let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
    bencher.counter(ItemsCount::new(BLOCK_LEN)).bench_local(|| {
        let tokens = Tokens { data: &x[..], token_stride: HEAD_DIM };
        tables.encode_block(isa, tokens, None, &mut packed, &mut scratch)
    });
}

#[divan::bench(args = ["portable", "neon", "avx2", "avx512"])]
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
