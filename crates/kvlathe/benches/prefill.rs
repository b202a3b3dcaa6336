//! Does encoding keep up with prefill? Tokens a second through all layers of SmolLM2-135M: append, encode, pack.
//!
//! ```text
//! cargo bench -p kvlathe --bench prefill
//! ```
//!
//! The preset is the shipped one; prompts come in chunks of 512 tokens, as a chunked prefill hands them over.

mod shipped;

use divan::counter::ItemsCount;
use kvlathe::cache::with_threads;
use shipped::{CHUNK, Shipped};

const N_CHUNKS: usize = 4;

fn main() {
    divan::main();
}

fn prefill(shipped: &Shipped, chunk: &[f32]) {
    for coding in &shipped.codings {
        let mut layer = shipped.layer(coding);
        (0..N_CHUNKS).for_each(|_| shipped.append(&mut layer, chunk));
        divan::black_box(layer.memory_use());
    }
}

#[divan::bench(args = [1, 2], sample_count = 20)]
fn smollm2(bencher: divan::Bencher<'_, '_>, n_threads: usize) {
    let shipped = Shipped::read();
    let chunk = shipped.activations(shipped.heads, CHUNK);
    bencher
        .counter(ItemsCount::new(CHUNK * N_CHUNKS))
        .bench(|| with_threads(n_threads, || prefill(&shipped, &chunk)).expect("threads"));
}
