//! Does encoding keep up with prefill? Tokens a second through all layers of SmolLM2-135M: append, encode, pack. And what
//! attention of a chunk takes, a layer behind a number of tokens.
//!
//! ```text
//! cargo bench -p kvlathe --bench prefill
//! ```
//!
//! The preset is the shipped one; prompts come in chunks of 512 tokens, as a chunked prefill hands them over.

mod shipped;

use divan::counter::ItemsCount;
use kvlathe::cache::{AttentionOptions, TensorView};
use shipped::{CHUNK, Shipped};

const N_CHUNKS: usize = 4;

fn main() {
    divan::main();
}

fn prefill(shipped: &Shipped, chunk: &[f32], n_threads: usize) {
    for coding in &shipped.codings {
        let mut layer = shipped.layer(coding);
        (0..N_CHUNKS).for_each(|_| shipped.append(&mut layer, chunk, n_threads));
        divan::black_box(layer.memory_use());
    }
}

#[divan::bench(args = [1, 2], sample_count = 20)]
fn smollm2(bencher: divan::Bencher<'_, '_>, n_threads: usize) {
    let shipped = Shipped::read();
    let chunk = shipped.activations(shipped.heads, CHUNK);
    bencher.counter(ItemsCount::new(CHUNK * N_CHUNKS)).bench(|| prefill(&shipped, &chunk, n_threads));
}

/// Query heads that share a KV head.
const GROUP: usize = 3;

#[divan::bench(args = [1, 2], consts = [2048, 8192], sample_count = 20)]
fn attend<const N_TOKENS: usize>(bencher: divan::Bencher<'_, '_>, n_threads: usize) {
    let shipped = Shipped::read();
    let mut layer = shipped.layer(&shipped.codings[shipped.codings.len() / 2]);
    for _ in 0..N_TOKENS / CHUNK {
        shipped.append(&mut layer, &shipped.activations(shipped.heads, CHUNK), 1);
    }
    let query_heads = shipped.heads * GROUP;
    let queries: Vec<f32> = shipped.activations(query_heads, CHUNK);
    let options =
        AttentionOptions { scaling: (shipped.head_dim as f32).sqrt().recip(), ..Default::default() };
    let mut out = vec![0.0; queries.len()];
    bencher.counter(ItemsCount::new(CHUNK)).bench_local(|| {
        let shape = [1, query_heads, CHUNK, shipped.head_dim];
        let view = TensorView::contiguous(&queries, shape).expect("whole queries");
        layer.attend(view, options, &mut out, None, n_threads).expect("a fitting shape");
    });
}
