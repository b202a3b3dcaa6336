//! Layers as the shipped preset of SmolLM2-135M codes them, and tokens for them.

use kvlathe::LayerCodings;
use kvlathe::cache::{LayerCache, Policy, TensorView};
use kvlathe::codec::Element;
use kvlathe::preset::Preset;

const PRESET: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../python/kvlathe/presets/smollm2-135m-instruct-balanced.safetensors"
);
/// Tokens that a chunked prefill hands over together.
pub const CHUNK: usize = 512;

pub struct Shipped {
    pub codings: Vec<LayerCodings>,
    pub heads: usize,
    pub head_dim: usize,
}

impl Shipped {
    pub fn read() -> Self {
        let preset = Preset::read(PRESET).expect("the shipped preset");
        let codings = kvlathe::layer_codings(&preset).expect("a valid preset");
        Self { codings, heads: preset.lathe().expect("streams").n_kv_heads, head_dim: preset.meta().head_dim }
    }

    /// An empty layer with 4 sinks and 128 recent tokens exact.
    pub fn layer<E: Element>(&self, coding: &LayerCodings) -> LayerCache<E> {
        let policy = Policy { n_sinks: 4, n_tail: 128, ..Policy::default() };
        coding.cache(policy, 1).expect("the preset's shape")
    }

    /// `[1, heads, n_tokens, head_dim]`: smooth, with a different size for each token.
    pub fn activations<E: Element>(&self, heads: usize, n_tokens: usize) -> Vec<E> {
        let size = |i: usize| 1.0 + (i / self.head_dim % 7) as f32;
        (0..heads * n_tokens * self.head_dim)
            .map(|i| E::from_f32((i as f32 * 0.618).sin() * size(i)))
            .collect()
    }

    /// Appends `data` as keys and as values, and codes what has left the tail on so many threads.
    pub fn append<E: Element>(&self, layer: &mut LayerCache<E>, data: &[E], n_threads: usize) {
        let n_tokens = data.len() / (self.heads * self.head_dim);
        let view =
            TensorView::contiguous(data, [1, self.heads, n_tokens, self.head_dim]).expect("whole tokens");
        layer.append(view, view).expect("finite values");
        layer.compress(n_threads).expect("encodable values");
    }
}
