//! Presets whose layers differ: what they say of each layer, and what is refused.

mod common;

use common::{partial_sample, sample};
use kvlathe_preset::{LayerPreset, LayerShape, Preset, PresetError, Side, UNIFORM_VERSION};
use serde_json::{Value, json};

fn tree() -> Value {
    serde_json::from_str(&partial_sample().to_json_string().unwrap()).unwrap()
}

fn message(tree: &Value) -> String {
    match Preset::from_bytes(tree.to_string().as_bytes()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it was read"),
    }
}

#[test]
fn what_a_preset_says_of_its_layers() {
    let preset = partial_sample();
    let meta = preset.meta();
    let last = LayerShape { n_kv_heads: 1, key_dim: 6, value_dim: 4 };
    assert_eq!((meta.layer_shape(0), meta.layer_shape(2), meta.layer_shape(3)), (None, Some(last), None));
    assert_eq!((last.dim(Side::Key), last.dim(Side::Value)), (6, 4));
    assert!(preset.stream(0, Side::Key, 0).is_none() && preset.stream(2, Side::Key, 0).is_some());
    // Without shapes, all layers are alike; a seed preset has no streams.
    let mut uniform = sample(2, 2, 4, 2);
    let shape = LayerShape { n_kv_heads: 2, key_dim: 4, value_dim: 4 };
    assert_eq!(uniform.meta().layer_shape(1), Some(shape));
    uniform.meta.lathe = None;
    assert_eq!(uniform.meta().layer_shape(1), Some(LayerShape { n_kv_heads: 0, ..shape }));
}

#[test]
fn both_containers_hold_the_same() {
    let preset = partial_sample().rounded();
    let text = preset.to_json_string().unwrap();
    let tensors = preset.to_safetensors_bytes().unwrap();
    assert_eq!(Preset::from_bytes(text.as_bytes()).unwrap(), preset);
    assert_eq!(Preset::from_bytes(&tensors).unwrap(), preset);
    let other = sample(3, 2, 4, 2);
    assert_ne!(preset.digest(), other.digest());
}

#[test]
fn older_versions_do_not_know_the_key() {
    let mut tree: Value = serde_json::from_str(&sample(2, 2, 4, 2).to_json_string().unwrap()).unwrap();
    assert_eq!(tree["kvlathe"]["format_version"], UNIFORM_VERSION);
    assert!(tree["kvlathe"].get("layer_shapes").is_none());
    tree["kvlathe"]["layer_shapes"] = json!([null, [7, 7, 7]]);
    let preset = Preset::from_bytes(tree.to_string().as_bytes()).unwrap();
    assert_eq!(preset.lathe().unwrap().layer_shapes, None);
}

#[test]
fn shapes_that_make_no_sense() {
    let cases: [(&str, Value, &str); 9] = [
        ("layer_shapes", json!([null, [2, 4, 4]]), "layer_shapes"),
        ("layer_shapes", json!([null, null, null]), "a layer that is coded"),
        ("layer_shapes", json!([null, [0, 4, 4], [1, 6, 4]]), "layer_shapes[1]"),
        ("layer_shapes", json!([null, [2, 4, 4], [1, 6, 1]]), "V components of kvlathe.layer_shapes[2]"),
        ("layer_shapes", json!([null, [2, 4, 4], [1, 2048, 4]]), "K components of kvlathe.layer_shapes[2]"),
        ("layer_shapes", json!([null, [2, 4, 4], [1, 8, 4]]), "layer 2"),
        ("layer_shapes", json!([[2, 4, 4], [2, 4, 4], [1, 6, 4]]), "layers[0]"),
        ("layer_shapes", json!([null, null, [1, 6, 4]]), "n_kv_heads"),
        ("n_kv_heads", json!(1), "n_kv_heads"),
    ];
    for (key, value, expected) in cases {
        let mut tree = tree();
        tree["kvlathe"][key] = value;
        let message = message(&tree);
        assert!(message.contains(expected), "{message} lacks {expected}");
    }
    let mut tree = tree();
    tree["layers"][0]["rope"] = json!(0);
    assert!(message(&tree).contains("layers[0]"));
    let mut tree = self::tree();
    let keys = tree["layers"][1]["K"].clone();
    tree["layers"][0]["K"] = keys;
    assert!(message(&tree).contains("not coded"));
}

#[test]
fn a_rotation_that_is_longer_than_a_layers_keys() {
    let mut preset = partial_sample();
    let rope =
        kvlathe_preset::Rope::new(kvlathe_preset::Pairing::HalfSplit, 6, vec![1.0, 0.5, 0.25]).unwrap();
    preset.meta.lathe.as_mut().unwrap().rope.push(rope);
    preset.layers[2].rope = Some(2);
    preset.validate().unwrap();
    preset.layers[1].rope = Some(2);
    assert!(
        preset.validate().unwrap_err().to_string().contains("at most 4, the components of a key of layer 1")
    );
}

#[test]
fn what_a_writer_refuses() {
    let mut preset = partial_sample();
    preset.meta.lathe.as_mut().unwrap().format_version = UNIFORM_VERSION;
    assert!(matches!(preset.to_json_string(), Err(PresetError::Invalid { .. })));
    let mut preset = partial_sample();
    preset.layers[1] = LayerPreset::default();
    assert!(preset.to_json_string().is_err());
}
