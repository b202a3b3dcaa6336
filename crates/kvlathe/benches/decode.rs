//! One layer's attention in a decode step, straight from the blocks: what a step costs by context length and threads.
//!
//! ```text
//! cargo bench -p kvlathe --bench decode
//! ```
//!
//! The preset is the shipped one (three KV heads of 64 components); seven queries share each, as in Qwen2.5-0.5B.

use divan::black_box;
use half::bf16;
use kvlathe::cache::{AttentionOptions, LayerCache, Policy, TensorView};
use kvlathe::preset::Preset;

const PRESET: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../python/kvlathe/presets/smollm2-135m-instruct-balanced.safetensors"
);
const CHUNK: usize = 512;
const GROUP: usize = 7;

fn main() {
    divan::main();
}

/// `[1, heads, tokens, head_dim]`: smooth, with a different size for each token.
fn activations(heads: usize, n_tokens: usize, head_dim: usize) -> Vec<bf16> {
    let size = |i: usize| 1.0 + (i / head_dim % 7) as f32;
    (0..heads * n_tokens * head_dim).map(|i| bf16::from_f32((i as f32 * 0.618).sin() * size(i))).collect()
}

/// A middle layer behind `n_tokens` tokens.
fn layer(n_tokens: usize) -> (LayerCache<bf16>, usize, usize) {
    let preset = Preset::read(PRESET).expect("the shipped preset");
    let codings = kvlathe::layer_codings(&preset).expect("a valid preset");
    let (heads, head_dim) = (preset.lathe().expect("streams").n_kv_heads, preset.meta().head_dim);
    let policy = Policy { n_sinks: 4, compress_start_len: 0, n_tail: 128 };
    let coding = &codings[codings.len() / 2];
    let mut layer =
        LayerCache::new(coding.key.clone(), coding.value.clone(), policy, 1, heads, (head_dim, head_dim))
            .expect("the preset's shape");
    let mut left = n_tokens;
    while left > 0 {
        let chunk = left.min(CHUNK);
        let data = activations(heads, chunk, head_dim);
        let view = TensorView::contiguous(&data, [1, heads, chunk, head_dim]).expect("a whole chunk");
        layer.append(view, view).expect("finite values");
        layer.compress().expect("encodable values");
        left -= chunk;
    }
    (layer, heads, head_dim)
}

#[divan::bench(args = [128, 256, 512, 2048, 16384, 32768], consts = [1, 2], sample_count = 300)]
fn attend<const THREADS: usize>(bencher: divan::Bencher<'_, '_>, n_tokens: usize) {
    let (layer, heads, head_dim) = layer(n_tokens);
    let queries = activations(heads * GROUP, 1, head_dim);
    let options = AttentionOptions { scaling: (head_dim as f32).sqrt().recip(), ..Default::default() };
    let mut out = vec![bf16::ZERO; queries.len()];
    bencher.bench_local(|| {
        let view = TensorView::contiguous(&queries, [1, heads * GROUP, 1, head_dim]).expect("whole queries");
        layer.attend(black_box(view), options, &mut out, THREADS).expect("a fitting shape");
    });
}
