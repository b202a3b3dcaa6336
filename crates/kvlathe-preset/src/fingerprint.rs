//! Which model is this? A hash over the part of a model's config that decides what its cache contains.
//!
//! There are two of them. [`cache_fingerprint`] is the one that a model is judged by; [`fingerprint`] is what the
//! first presets carry and the first readers ask for. That one takes the size of the vocabulary, too, which keys and
//! values know nothing of: a model whose embeddings were resized keeps its cache, and must keep its preset.

use std::fmt::Write;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{Preset, PresetError};

/// The one key that [`fingerprint`] takes and [`cache_fingerprint`] does not.
const VOCABULARY: &str = "vocab_size";

/// More tokens than any vocabulary has.
const MAX_VOCABULARY: usize = 1 << 20;

/// The keys that count. Names of files, versions, dtypes and training settings change without the cache
/// changing. The size of the MLPs (`intermediate_size`) is no size of the cache, but nothing changes it and leaves
/// a layer's weights as they were: it tells models apart.
const KEYS: [&str; 14] = [
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    VOCABULARY,
    "sliding_window",
    "layer_types",
    "intermediate_size",
    "n_embd",
    "n_layer",
    "n_head",
    "rope_parameters",
];

/// Fingerprint of a model's config (`config.json`, or `config.to_dict()`): the SHA-256, as 64 lower-case hex
/// digits, of the keys that decide what its cache contains, in a canonical form. `""` when the config has
/// none of them.
///
/// The same model has the same fingerprint under any version of the library that wrote the config: `null`
/// counts as absent, `10000.0` as `10000`, defaults that newer versions spell out are filled in or left out,
/// and `rope_theta`, `rope_scaling` and `partial_rotary_factor` are gathered in `rope_parameters`, as newer
/// versions do. A config that nests its text model (`text_config`) must be passed as that nested object.
///
/// ```
/// use kvlathe_preset::cache_fingerprint;
/// use serde_json::json;
///
/// let old = json!({"model_type": "llama", "hidden_size": 576, "rope_theta": 10000.0, "rope_scaling": null});
/// let new = json!({"model_type": "llama", "hidden_size": 576, "transformers_version": "5.0.0",
///                  "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "vocab_size": 32016});
/// assert_eq!(cache_fingerprint(&old), cache_fingerprint(&new));
/// ```
pub fn cache_fingerprint(config: &Value) -> String {
    chosen_keys(config, false).map_or_else(String::new, |chosen| hex(Sha256::digest(canonical(chosen))))
}

/// [`cache_fingerprint`] with the size of the vocabulary among the keys: what presets carried first, and older
/// readers ask for.
pub fn fingerprint(config: &Value) -> String {
    chosen_keys(config, true).map_or_else(String::new, |chosen| hex(Sha256::digest(canonical(chosen))))
}

/// Whether `expected` is the [`fingerprint`] of this config with some size of its vocabulary, up to
/// [`MAX_VOCABULARY`]. A hash tells nothing of what went into it, but there are few sizes: all are tried, in well
/// under a second, and a match proves that everything else is the same.
fn matches_with_some_vocabulary(expected: &str, config: &Value) -> bool {
    let Some(chosen) = chosen_keys(config, false) else { return false };
    let Some(expected) = digest_of(expected) else { return false };
    // The size comes last, as no key sorts after it: what comes before is hashed once.
    let text = canonical(chosen);
    let others = text.strip_suffix('}').unwrap_or(&text);
    let comma = if others.len() > 1 { "," } else { "" };
    let before = Sha256::new_with_prefix(format!("{others}{comma}\"{VOCABULARY}\":"));
    (1..=MAX_VOCABULARY).any(|n_tokens| {
        let mut hash = before.clone();
        hash.update(n_tokens.to_string());
        hash.update("}");
        hash.finalize()[..] == expected
    })
}

impl Preset {
    /// Checks that the preset belongs to the model with this config. A preset without fingerprints passes.
    ///
    /// A preset that has no `cache_fingerprint` yet is held to its [`fingerprint`], for any size of the vocabulary.
    ///
    /// # Errors
    ///
    /// [`PresetError::WrongModel`] when the preset was calibrated for another model.
    pub fn check_model(&self, config: &Value) -> Result<(), PresetError> {
        let Some(lathe) = self.lathe() else { return Ok(()) };
        let is_old = lathe.cache_fingerprint.is_empty();
        let (expected, given) = if is_old {
            (&lathe.fingerprint, fingerprint(config))
        } else {
            (&lathe.cache_fingerprint, cache_fingerprint(config))
        };
        if expected.is_empty()
            || *expected == given
            || is_old && matches_with_some_vocabulary(expected, config)
        {
            return Ok(());
        }
        let start = |digits: &str| digits.chars().take(12).collect();
        Err(PresetError::WrongModel {
            model: self.meta.model.clone(),
            expected: start(expected),
            given: if given.is_empty() { "unknown".to_owned() } else { start(&given) },
        })
    }
}

/// The keys that count, with defaults filled in; `None` when the config has none of them.
fn chosen_keys(config: &Value, with_vocabulary: bool) -> Option<Map<String, Value>> {
    let mut chosen = choose(config.as_object()?);
    if !with_vocabulary {
        chosen.remove(VOCABULARY);
    }
    if chosen.is_empty() {
        return None;
    }
    fill_defaults(&mut chosen);
    Some(chosen)
}

fn canonical(chosen: Map<String, Value>) -> String {
    let mut text = String::new();
    write_canonical(&Value::Object(chosen), &mut text);
    text
}

fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    let mut hex = String::with_capacity(64);
    for byte in digest {
        write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
    }
    hex
}

/// The 32 bytes that 64 hex digits stand for.
fn digest_of(hex: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if hex.len() != 64 {
        return None;
    }
    for (at, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(digest)
}

fn choose(config: &Map<String, Value>) -> Map<String, Value> {
    let present = |key: &str| config.get(key).filter(|value| !value.is_null());
    let mut chosen = Map::new();
    for key in KEYS {
        if let Some(value) = present(key) {
            chosen.insert(key.to_owned(), value.clone());
        }
    }
    // Older configs keep a window that the model does not use.
    if present("use_sliding_window") == Some(&Value::Bool(false)) {
        chosen.remove("sliding_window");
    }
    let mut rope = match present("rope_parameters").or_else(|| present("rope_scaling")) {
        Some(Value::Object(rope)) => rope.clone(),
        _ => Map::new(),
    };
    rope.retain(|_, value| !value.is_null());
    // One entry per kind of layer: already in the new form, nothing to gather.
    if !rope.values().any(Value::is_object) {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let (None, Some(value)) = (rope.get(key), present(key)) {
                rope.insert(key.to_owned(), value.clone());
            }
        }
        if let Some(kind) = rope.remove("type") {
            rope.entry("rope_type").or_insert(kind);
        }
        if !rope.is_empty() {
            rope.entry("rope_type").or_insert_with(|| "default".into());
        }
    }
    if rope.is_empty() {
        chosen.remove("rope_parameters");
    } else {
        chosen.insert("rope_parameters".to_owned(), Value::Object(rope));
    }
    chosen
}

/// What newer versions write out and older ones leave to the code.
fn fill_defaults(chosen: &mut Map<String, Value>) {
    let number = |key: &str, chosen: &Map<String, Value>| chosen.get(key).and_then(Value::as_u64);
    if let (Some(hidden), Some(heads @ 1..)) =
        (number("hidden_size", chosen), number("num_attention_heads", chosen))
    {
        chosen.entry("num_key_value_heads").or_insert_with(|| heads.into());
        chosen.entry("head_dim").or_insert_with(|| (hidden / heads).into());
    }
    // "All layers are ordinary" says nothing.
    let is_full = |kind: &Value| kind == "full_attention";
    if chosen.get("layer_types").and_then(Value::as_array).is_some_and(|kinds| kinds.iter().all(is_full)) {
        chosen.remove("layer_types");
    }
}

/// Compact JSON with sorted keys, without `null` members, and with one spelling for each number.
fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            // Sorted here, since a feature of serde_json that another crate enables would keep insertion
            // order.
            let mut members: Vec<_> = map.iter().filter(|(_, value)| !value.is_null()).collect();
            members.sort_unstable_by_key(|(key, _)| key.as_str());
            out.push('{');
            for (index, (key, value)) in members.into_iter().enumerate() {
                out.push_str(if index == 0 { "" } else { "," });
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { "," });
                write_canonical(item, out);
            }
            out.push(']');
        }
        // Rust shows a float64 in positional notation, as short as it can: 1e4, 10000.0 and 10000 agree. Adding zero
        // turns −0 into 0.
        Value::Number(number) => match number.as_f64() {
            Some(float) => write!(out, "{}", float + 0.0).expect("writing to a String cannot fail"),
            None => out.push_str(&number.to_string()),
        },
        Value::Null | Value::Bool(_) | Value::String(_) => out.push_str(&value.to_string()),
    }
}
