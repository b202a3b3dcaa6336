//! Presets to test with: small, deterministic on every platform (only +, ×, ÷ and √), and with every feature
//! in use.

#![allow(dead_code, reason = "each test binary uses some of these")]

use kvlathe_preset::{
    LatheMeta, LayerPreset, LayerShape, Meta, Pairing, Preset, Rope, SharedBasis, SidePreset, StreamPreset,
    UNIFORM_VERSION,
};
use serde_json::{Value, json};

/// A linear congruential generator, in [−1, 1).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / f64::from(1 << 23) - 1.0
    }

    pub fn vec(&mut self, len: usize, scale: f64) -> Vec<f32> {
        (0..len).map(|_| (scale * self.next()) as f32).collect()
    }
}

/// `[head_dim, rank]` row-major with orthonormal columns, by Gram and Schmidt.
pub fn orthonormal(head_dim: usize, rank: usize, random: &mut Random) -> Vec<f32> {
    let mut columns: Vec<Vec<f64>> = Vec::new();
    while columns.len() < rank {
        let mut column: Vec<f64> = (0..head_dim).map(|_| random.next()).collect();
        for other in &columns {
            let dot: f64 = column.iter().zip(other).map(|(a, b)| a * b).sum();
            column.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
        }
        let norm = column.iter().map(|a| a * a).sum::<f64>().sqrt();
        column.iter_mut().for_each(|a| *a /= norm);
        columns.push(column);
    }
    (0..head_dim * rank).map(|at| columns[at % rank][at / rank] as f32).collect()
}

fn side(n_kv_heads: usize, d: usize, rank: usize, random: &mut Random) -> SidePreset {
    let shared = SharedBasis { rank, u: orthonormal(d, rank, random), mean: random.vec(d, 3.0) };
    let streams = (0..n_kv_heads).map(|_| StreamPreset {
        mean: random.vec(d, 0.7),
        basis: random.vec(d * d, 2.0),
        importance: random.vec(d, 1.0).into_iter().map(f32::abs).collect(),
        widths: (0..d).map(|_| [0, 1, 2, 3, 4, 8][((random.next() + 1.0) * 3.0) as usize]).collect(),
    });
    SidePreset { shared: Some(shared), streams: streams.collect() }
}

/// A kvlathe preset. Numbers are not rounded to float16 yet.
pub fn sample(n_layers: usize, n_kv_heads: usize, head_dim: usize, rank: usize) -> Preset {
    let mut random = Random::new(7);
    let rope = |pairing, rotary_dim: usize, random: &mut Random| {
        let inv_freq = (0..rotary_dim / 2).map(|_| (random.next() + 1.001) / 3.0).collect();
        Rope::new(pairing, rotary_dim, inv_freq).expect("a valid rotation")
    };
    let ropes =
        vec![rope(Pairing::HalfSplit, head_dim, &mut random), rope(Pairing::Interleaved, 2, &mut random)];
    let layers = (0..n_layers).map(|layer| LayerPreset {
        // Every third layer is not rotated.
        rope: Some(layer % 3).filter(|&index| index < ropes.len()),
        key: side(n_kv_heads, head_dim, rank, &mut random),
        value: side(n_kv_heads, head_dim, rank, &mut random),
    });
    let layers = layers.collect();
    let meta = Meta {
        model: "example/tiny".to_owned(),
        rank,
        head_dim,
        n_layers,
        n_heads: 3 * n_kv_heads,
        compression_ratio: 16.0 / 2.7,
        lathe: Some(LatheMeta {
            format_version: UNIFORM_VERSION,
            library_version: "0.1.0".to_owned(),
            n_kv_heads,
            layer_shapes: None,
            block_len: 32,
            n_sinks: 4,
            bits_per_value: 2.7,
            fingerprint: "0123456789abcdef".repeat(4),
            // The golden files are older than this.
            cache_fingerprint: String::new(),
            model_type: "llama".to_owned(),
            created: "2026-11-23".to_owned(),
            calibration: object(
                json!({"n_tokens": 65536, "seed": 0, "text": "WikiText-2 \"train\"", "window": 1024}),
            ),
            measured: object(json!({
                "curve": [[2.0, 0.0056], [3.0, 0.0014]], "kld": 0.0014, "note": "π ≈ 3.14",
                "perplexity": {"baseline": 16.1, "compressed": 0.1 + 0.2 + 16.0}
            })),
            rope: ropes,
        }),
    };
    Preset { meta, layers }
}

/// A preset whose layers differ: the first is not coded, the last has keys of another size than values.
pub fn partial_sample() -> Preset {
    let mut preset = sample(3, 2, 4, 2);
    let mut random = Random::new(8);
    let shape = |n_kv_heads, key_dim, value_dim| Some(LayerShape { n_kv_heads, key_dim, value_dim });
    let lathe = preset.meta.lathe.as_mut().expect("a kvlathe preset");
    lathe.layer_shapes = Some(vec![None, shape(2, 4, 4), shape(1, 6, 4)]);
    lathe.format_version = lathe.least_version();
    preset.layers[0] = LayerPreset::default();
    preset.layers[2] =
        LayerPreset { rope: Some(0), key: side(1, 6, 2, &mut random), value: side(1, 4, 2, &mut random) };
    preset
}

/// A seed preset whose first layer leaves K alone.
pub fn seed_sample() -> Preset {
    let mut preset = sample(2, 1, 4, 2);
    preset.meta.lathe = None;
    for layer in &mut preset.layers {
        layer.rope = None;
        layer.key.streams.clear();
        layer.value.streams.clear();
    }
    preset.layers[0].key.shared = None;
    preset
}

fn object(value: Value) -> serde_json::Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// The JSON form of a preset as a tree, to be broken by tests.
pub fn tree(preset: &Preset) -> Value {
    serde_json::from_str(&preset.to_json_string().expect("a valid preset")).expect("valid JSON")
}

/// Reads a tree back.
pub fn read_tree(tree: &Value) -> Result<Preset, kvlathe_preset::PresetError> {
    Preset::from_bytes(tree.to_string().as_bytes())
}

/// Bit patterns of all float32 numbers, since `==` cannot tell −0 from 0.
pub fn bits(preset: &Preset) -> Vec<u32> {
    let sides = preset.layers.iter().flat_map(|layer| [&layer.key, &layer.value]);
    let arrays = sides.flat_map(|side| {
        let shared = side.shared.iter().flat_map(|shared| [&shared.u, &shared.mean]);
        let streams =
            side.streams.iter().flat_map(|stream| [&stream.mean, &stream.basis, &stream.importance]);
        shared.chain(streams).collect::<Vec<_>>()
    });
    arrays.flatten().map(|number| number.to_bits()).collect()
}
