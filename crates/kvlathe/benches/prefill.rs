//! Does encoding keep up with prefill? Tokens a second through all layers of SmolLM2-135M: append, encode, pack.
//!
//! ```text
//! cargo bench -p kvlathe --bench prefill
//! ```
//!
//! The preset is the shipped one; prompts come in chunks of 512 tokens, as a chunked prefill hands them over.

use divan::counter::ItemsCount;
use kvlathe::LayerCodings;
use kvlathe::cache::{LayerCache, Policy, TensorView, with_threads};
use kvlathe::preset::Preset;

const PRESET: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../python/kvlathe/presets/smollm2-135m-instruct-balanced.safetensors"
);
const CHUNK: usize = 512;
const N_CHUNKS: usize = 4;

fn main() {
    divan::main();
}

/// Keys and values of one chunk, `[1, heads, CHUNK, head_dim]`: smooth, with a different size for each token.
fn chunk(heads: usize, head_dim: usize) -> Vec<f32> {
    (0..heads * CHUNK * head_dim)
        .map(|i| (i as f32 * 0.618).sin() * (1.0 + (i / head_dim % 7) as f32))
        .collect()
}

fn prefill(codings: &[LayerCodings], data: &[f32], heads: usize, head_dim: usize) {
    let policy = Policy { n_sinks: 4, compress_start_len: 0, n_tail: 128 };
    for coding in codings {
        let mut layer =
            LayerCache::new(coding.key.clone(), coding.value.clone(), policy, 1, heads, (head_dim, head_dim))
                .expect("the preset's shape");
        for _ in 0..N_CHUNKS {
            let view = TensorView::contiguous(data, [1, heads, CHUNK, head_dim]).expect("a whole chunk");
            layer.append(view, view).expect("finite values");
            layer.compress().expect("encodable values");
        }
        divan::black_box(layer.memory_use());
    }
}

#[divan::bench(args = [1, 2], sample_count = 20)]
fn smollm2(bencher: divan::Bencher<'_, '_>, n_threads: usize) {
    let preset = Preset::read(PRESET).expect("the shipped preset");
    let codings = kvlathe::layer_codings(&preset).expect("a valid preset");
    let (heads, head_dim) = (preset.lathe().expect("streams").n_kv_heads, preset.meta().head_dim);
    let data = chunk(heads, head_dim);
    bencher
        .counter(ItemsCount::new(CHUNK * N_CHUNKS))
        .bench(|| with_threads(n_threads, || prefill(&codings, &data, heads, head_dim)).expect("threads"));
}
