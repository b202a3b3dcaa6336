//! One layer's attention in a decode step, straight from the blocks: what a step costs by context length and threads.
//!
//! ```text
//! cargo bench -p kvlathe --bench decode
//! ```
//!
//! The preset is the shipped one (three KV heads of 64 components); seven queries share each, as in Qwen2.5-0.5B.

mod shipped;

use divan::black_box;
use half::bf16;
use kvlathe::cache::{AttentionOptions, LayerCache, TensorView};
use shipped::{CHUNK, Shipped};

const GROUP: usize = 7;

fn main() {
    divan::main();
}

/// A middle layer behind `n_tokens` tokens.
fn layer_behind(shipped: &Shipped, n_tokens: usize) -> LayerCache<bf16> {
    let mut layer = shipped.layer(&shipped.codings[shipped.codings.len() / 2]);
    for first in (0..n_tokens).step_by(CHUNK) {
        let chunk = shipped.activations(shipped.heads, CHUNK.min(n_tokens - first));
        shipped.append(&mut layer, &chunk, 1);
    }
    layer
}

#[divan::bench(args = [128, 256, 512, 2048, 16384, 32768], consts = [1, 2], sample_count = 300)]
fn attend<const THREADS: usize>(bencher: divan::Bencher<'_, '_>, n_tokens: usize) {
    let shipped = Shipped::read();
    let (layer, query_heads, head_dim) =
        (layer_behind(&shipped, n_tokens), shipped.heads * GROUP, shipped.head_dim);
    let queries = shipped.activations(query_heads, 1);
    let options = AttentionOptions { scaling: (head_dim as f32).sqrt().recip(), ..Default::default() };
    let mut out = vec![bf16::ZERO; queries.len()];
    bencher.bench_local(|| {
        let view = TensorView::contiguous(&queries, [1, query_heads, 1, head_dim]).expect("whole queries");
        layer.attend(black_box(view), options, &mut out, None, THREADS).expect("a fitting shape");
    });
}
