//! The data model. Plain structs with public fields: calibration fills them, the codec reads them, and
//! [`Preset::validate`](crate::Preset::validate) says whether they make sense.

use kvlathe_codec::{LayerShape, Rope, Side};
use serde_json::{Map, Value};

use crate::{FORMAT_VERSION, UNIFORM_VERSION};

/// A calibrated preset: what the whole model has in common, and one entry per layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// Facts about the model and the calibration.
    pub meta: Meta,
    /// One entry per transformer layer, in order; [`Meta::n_layers`] of them.
    pub layers: Vec<LayerPreset>,
}

/// Facts that hold for all layers: the six keys of a seed preset, and ours.
#[derive(Clone, Debug, PartialEq)]
pub struct Meta {
    /// Name of the model, as one would give it to `from_pretrained`.
    pub model: String,
    /// Columns of every shared `U`, in `1..=head_dim`.
    pub rank: usize,
    /// Length of one head's key or value vector, in `1..=`[`MAX_HEAD_DIM`](kvlathe_codec::MAX_HEAD_DIM). Where layers
    /// differ ([`LatheMeta::layer_shapes`]): of a key in the first layer that is coded.
    pub head_dim: usize,
    /// Transformer layers, in `1..=`[`MAX_LAYERS`](crate::MAX_LAYERS).
    pub n_layers: usize,
    /// *Query* heads; KV heads are counted by [`LatheMeta::n_kv_heads`].
    pub n_heads: usize,
    /// Of the shared bases alone, as the seed counts it: `16 · head_dim / (8 · rank)`, which is taken if it is left out;
    /// finite and above 0. What the streams take is [`LatheMeta::bits_per_value`].
    pub compression_ratio: f64,
    /// What only kvlathe presets have; `None` marks a seed preset.
    pub lathe: Option<LatheMeta>,
}

/// The part of the metadata that seed presets lack.
#[derive(Clone, Debug, PartialEq)]
pub struct LatheMeta {
    /// Version of the format, at most [`FORMAT_VERSION`](crate::FORMAT_VERSION).
    pub format_version: u32,
    /// Version of the library that calibrated.
    pub library_version: String,
    /// KV heads per layer, a divisor of [`Meta::n_heads`], at most [`MAX_KV_HEADS`](crate::MAX_KV_HEADS). Where layers
    /// differ: of the first layer that is coded.
    pub n_kv_heads: usize,
    /// Which layers are coded, and the sizes of each: [`Meta::n_layers`] entries, `None` for a layer that the model's own
    /// cache keeps (linear attention, say). `None` as a whole: all layers are coded and alike.
    pub layer_shapes: Option<Vec<Option<LayerShape>>>,
    /// Tokens per packed block, one of [`BLOCK_LENS`](kvlathe_codec::BLOCK_LENS).
    pub block_len: usize,
    /// First tokens of a sequence that stay exact, at most [`MAX_SINKS`](crate::MAX_SINKS).
    pub n_sinks: usize,
    /// Mean bits per cached number of the coded part, side information counted. Finite, at least 0.
    pub bits_per_value: f64,
    /// [`fingerprint`](crate::fingerprint()) of the model's config: 64 lower-case hex digits, or `""` when
    /// unknown. For older readers: it counts the size of the vocabulary.
    pub fingerprint: String,
    /// [`cache_fingerprint`](crate::cache_fingerprint()) of the model's config, the one that a model is judged by:
    /// 64 lower-case hex digits, or `""` when unknown and in presets that were made before there was one.
    pub cache_fingerprint: String,
    /// `model_type` of the model's config, such as `"llama"`.
    pub model_type: String,
    /// Date of the calibration, ISO 8601.
    pub created: String,
    /// Free-form record of how it was calibrated: text, number of tokens, seed, metric, window.
    pub calibration: Map<String, Value>,
    /// Free-form record of what was measured: perplexities, KLD, top-1 agreement, the tuner's curve.
    pub measured: Map<String, Value>,
    /// The distinct rotary embeddings of the model, at most [`MAX_LAYERS`](crate::MAX_LAYERS); layers refer to them by
    /// index. `rotary_dim` is at most [`Meta::head_dim`], and frequencies are above 0.
    pub rope: Vec<Rope>,
}

/// One transformer layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerPreset {
    /// Index into [`LatheMeta::rope`]; `None` when the layer's keys are not rotated (and in every seed
    /// preset).
    pub rope: Option<usize>,
    /// How keys are coded.
    pub key: SidePreset,
    /// How values are coded.
    pub value: SidePreset,
}

/// The keys or the values of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SidePreset {
    /// The seed's basis, shared by all heads. Always there in a kvlathe preset; `None` in a seed preset means
    /// that this side is not compressed.
    pub shared: Option<SharedBasis>,
    /// One entry per KV head; empty in seed presets.
    pub streams: Vec<StreamPreset>,
}

/// The seed's low-rank basis: `x ≈ U Uᵀ (x − mean) + mean`.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedBasis {
    /// Columns of `u`, equal to [`Meta::rank`].
    pub rank: usize,
    /// `U`, `[head_dim, rank]` row-major, with orthonormal columns.
    pub u: Vec<f32>,
    /// `[head_dim]`, in the units of the cached vectors.
    pub mean: Vec<f32>,
}

/// The codec of one stream: K or V of one layer and KV head.
///
/// A *shape* is a cached vector divided by its own root mean square, so all numbers here are without units.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamPreset {
    /// `[head_dim]`, mean of the shape.
    pub mean: Vec<f32>,
    /// `[head_dim, head_dim]` row-major; column `j` is the synthesis vector of coefficient `j`, which has
    /// unit variance: `shape ≈ mean + Σⱼ zⱼ · column j`.
    pub basis: Vec<f32>,
    /// `[head_dim]`, weighted variance λ of each coefficient, at least 0.
    pub importance: Vec<f32>,
    /// `[head_dim]`, bits of each coefficient, each that of a [`Width`](kvlathe_codec::Width).
    pub widths: Vec<u8>,
}

impl LatheMeta {
    /// The oldest version of the format that says all this: files are written in it, so that older readers read what
    /// they can.
    pub fn least_version(&self) -> u32 {
        if self.layer_shapes.is_some() { FORMAT_VERSION } else { UNIFORM_VERSION }
    }
}

impl Meta {
    /// The sizes of a layer; `None` where it is not coded, and when there is no such layer. Seed presets have no streams,
    /// so theirs have no KV heads.
    pub fn layer_shape(&self, layer: usize) -> Option<LayerShape> {
        if layer >= self.n_layers {
            return None;
        }
        let n_kv_heads = self.lathe.as_ref().map_or(0, |lathe| lathe.n_kv_heads);
        let uniform = LayerShape { n_kv_heads, key_dim: self.head_dim, value_dim: self.head_dim };
        match self.lathe.as_ref().and_then(|lathe| lathe.layer_shapes.as_ref()) {
            None => Some(uniform),
            Some(shapes) => shapes.get(layer).copied().flatten(),
        }
    }
}

impl LayerPreset {
    /// The keys or the values of this layer.
    pub fn side(&self, side: Side) -> &SidePreset {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }
}

impl StreamPreset {
    /// Mean width in bits per coefficient, gains and other side information not counted.
    pub fn mean_width(&self) -> f64 {
        let total: u64 = self.widths.iter().map(|&width| u64::from(width)).sum();
        total as f64 / self.widths.len().max(1) as f64
    }
}

impl Preset {
    /// Facts about the model and the calibration.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// What only kvlathe presets have; `None` for a seed preset.
    pub fn lathe(&self) -> Option<&LatheMeta> {
        self.meta.lathe.as_ref()
    }

    /// Whether this is a seed preset: shared bases and int8, no streams.
    pub fn is_seed(&self) -> bool {
        self.meta.lathe.is_none()
    }

    /// One entry per layer.
    pub fn layers(&self) -> &[LayerPreset] {
        &self.layers
    }

    /// The rotary embedding of a layer; `None` when it has none, when there is no such layer, and in seed
    /// presets.
    pub fn rope(&self, layer: usize) -> Option<&Rope> {
        self.lathe()?.rope.get(self.layers.get(layer)?.rope?)
    }

    /// One stream; `None` when the preset has no such layer or head, or is a seed preset.
    pub fn stream(&self, layer: usize, side: Side, kv_head: usize) -> Option<&StreamPreset> {
        self.layers.get(layer)?.side(side).streams.get(kv_head)
    }

    /// The shared basis of one side; `None` when that side is not compressed or there is no such layer.
    pub fn shared(&self, layer: usize, side: Side) -> Option<&SharedBasis> {
        self.layers.get(layer)?.side(side).shared.as_ref()
    }
}
