//! The same model, the same fingerprint; another model, another.

mod common;

use common::sample;
use kvlathe_preset::{PresetError, cache_fingerprint, fingerprint};
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 100000,
        "rope_scaling": null, "torch_dtype": "bfloat16", "_name_or_path": "here", "transformers_version": "4.40.0"
    })
}

fn with_vocabulary(config: &Value, n_tokens: usize) -> Value {
    let mut config = config.clone();
    config["vocab_size"] = n_tokens.into();
    config
}

/// Pinned: the fingerprints in presets that exist must go on being valid.
#[test]
fn is_stable() {
    assert_eq!(fingerprint(&config()), "2c0767db18299e03c707781195652b1c946a978571ab0e9d4f37d05d220bef59");
}

/// By hand (`sha256sum` of the text that docs/preset_format.md writes out), not from this crate's output.
#[test]
fn of_the_cache_is_stable() {
    assert_eq!(
        cache_fingerprint(&config()),
        "9e3e44444a6d193c314f0a3b1b091de70041b5c25fe4f22be88262f80b893f84"
    );
}

#[test]
fn of_the_cache_does_not_depend_on_the_vocabulary() {
    let resized = with_vocabulary(&config(), 49216);
    assert_ne!(fingerprint(&resized), fingerprint(&config()));
    assert_eq!(cache_fingerprint(&resized), cache_fingerprint(&config()));
    let mut unknown = config();
    unknown.as_object_mut().unwrap().remove("vocab_size");
    assert_eq!(cache_fingerprint(&unknown), cache_fingerprint(&config()));
    assert_eq!(cache_fingerprint(&json!({"vocab_size": 7})), "");
}

/// One preset with both fingerprints, as they are written today, one with the first alone, and one with neither.
#[test]
fn presets_of_all_ages_know_their_model() {
    let base = config();
    let mut windowed = config();
    windowed["sliding_window"] = 64.into();
    let bare = json!({"hidden_size": 576, "vocab_size": 300});
    for model in [base, windowed, bare] {
        let mut preset = sample(1, 1, 4, 2);
        let lathe = preset.meta.lathe.as_mut().unwrap();
        lathe.fingerprint = fingerprint(&model);
        let old = preset.clone();
        preset.meta.lathe.as_mut().unwrap().cache_fingerprint = cache_fingerprint(&model);
        for n_tokens in [1, 299, 300, 49152, 49153, 262_208, 1 << 20] {
            let resized = with_vocabulary(&model, n_tokens);
            old.check_model(&resized).unwrap();
            preset.check_model(&resized).unwrap();
            // Which size it was calibrated with does not matter.
            let mut small = old.clone();
            small.meta.lathe.as_mut().unwrap().fingerprint = fingerprint(&resized);
            small.check_model(&model).unwrap();
        }
        for (key, value) in [("hidden_size", json!(640)), ("num_hidden_layers", json!(31))] {
            let mut other = model.clone();
            other[key] = value;
            for preset in [&old, &preset] {
                let error = preset.check_model(&other).unwrap_err();
                assert!(matches!(error, PresetError::WrongModel { .. }), "{key}: {error}");
            }
        }
        for preset in [&old, &preset] {
            preset.check_model(&json!({})).unwrap_err();
            preset.check_model(&json!({"vocab_size": 300})).unwrap_err();
        }
        let lathe = preset.meta.lathe.as_mut().unwrap();
        (lathe.fingerprint, lathe.cache_fingerprint) = (String::new(), String::new());
        preset.check_model(&json!({"model_type": "another"})).unwrap();
    }
}

/// What is written for older readers decides nothing here.
#[test]
fn the_cache_fingerprint_decides_where_there_is_one() {
    let mut other = config();
    other["num_hidden_layers"] = 31.into();
    let mut preset = sample(1, 1, 4, 2);
    let lathe = preset.meta.lathe.as_mut().unwrap();
    (lathe.fingerprint, lathe.cache_fingerprint) = (fingerprint(&config()), cache_fingerprint(&other));
    preset.check_model(&other).unwrap();
    let error = preset.check_model(&config()).unwrap_err();
    assert!(error.to_string().contains("9e3e44444a6d"), "{error}");
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
    let (expected, of_cache) = (fingerprint(&config()), cache_fingerprint(&config()));
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
        let differs = cache_fingerprint(&other) != of_cache;
        assert_eq!(differs, key != "vocab_size", "{key}");
    }
}

#[test]
fn is_empty_when_nothing_is_known() {
    for config in
        [json!(null), json!([]), json!({}), json!({"transformers_version": "5.0.0", "model_type": null})]
    {
        assert_eq!(fingerprint(&config), "");
        assert_eq!(cache_fingerprint(&config), "");
    }
}
