//! The same model, the same fingerprint; another model, another.

use kvlathe_preset::fingerprint;
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 100000,
        "rope_scaling": null, "torch_dtype": "bfloat16", "_name_or_path": "here", "transformers_version": "4.40.0"
    })
}

/// Pinned: the fingerprints in presets that exist must go on being valid.
#[test]
fn is_stable() {
    assert_eq!(fingerprint(&config()), "2c0767db18299e03c707781195652b1c946a978571ab0e9d4f37d05d220bef59");
}

#[test]
fn does_not_depend_on_what_does_not_matter() {
    let expected = fingerprint(&config());
    let newer = json!({
        "transformers_version": "5.23.0", "dtype": "float32", "_name_or_path": "there", "head_dim": 64,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "sliding_window": null,
        "vocab_size": 49152, "intermediate_size": 1536, "num_key_value_heads": 3, "num_attention_heads": 9,
        "num_hidden_layers": 30, "hidden_size": 576, "model_type": "llama",
        "layer_types": vec!["full_attention"; 30]
    });
    assert_eq!(fingerprint(&newer), expected);
    let mut unused_window = config();
    unused_window["sliding_window"] = 4096.into();
    unused_window["use_sliding_window"] = false.into();
    assert_eq!(fingerprint(&unused_window), expected);
}

#[test]
fn old_and_new_rope_scaling_agree() {
    let mut old = config();
    old["rope_scaling"] = json!({"type": "yarn", "factor": 4.0});
    old["partial_rotary_factor"] = 0.5.into();
    let mut new = config();
    new.as_object_mut().unwrap().remove("rope_theta");
    new["rope_parameters"] =
        json!({"rope_type": "yarn", "factor": 4, "rope_theta": 1e5, "partial_rotary_factor": 0.5});
    assert_eq!(fingerprint(&old), fingerprint(&new));
    assert_ne!(fingerprint(&old), fingerprint(&config()));
}

#[test]
fn depends_on_what_matters() {
    let expected = fingerprint(&config());
    for (key, value) in [
        ("model_type", json!("qwen2")),
        ("hidden_size", json!(577)),
        ("num_hidden_layers", json!(31)),
        ("num_attention_heads", json!(18)),
        ("num_key_value_heads", json!(9)),
        ("head_dim", json!(32)),
        ("vocab_size", json!(49153)),
        ("rope_theta", json!(100000.5)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0})),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
        ),
        ("partial_rotary_factor", json!(0.25)),
        ("sliding_window", json!(4096)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("intermediate_size", json!(1537)),
        ("n_embd", json!(768)),
        ("n_layer", json!(12)),
        ("n_head", json!(12)),
    ] {
        let mut other = config();
        other[key] = value;
        assert_ne!(fingerprint(&other), expected, "{key}");
    }
}

#[test]
fn is_empty_when_nothing_is_known() {
    for config in
        [json!(null), json!([]), json!({}), json!({"transformers_version": "5.0.0", "model_type": null})]
    {
        assert_eq!(fingerprint(&config), "");
    }
}
