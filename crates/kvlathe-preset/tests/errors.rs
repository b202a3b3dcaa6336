//! Every way to be wrong has its own error, and the error says what to do.

mod common;

use common::{read_tree, sample, seed_sample, tree};
use kvlathe_preset::{FORMAT_VERSION, MAX_FILE_BYTES, Preset, PresetError, Side};
use serde_json::{Value, json};

fn message(result: Result<Preset, PresetError>) -> String {
    result.expect_err("this must be refused").to_string()
}

#[track_caller]
fn assert_invalid(result: Result<impl std::fmt::Debug, PresetError>, field: &str) {
    match result {
        Err(PresetError::Invalid { what, .. }) => assert!(what.contains(field), "{what} instead of {field}"),
        other => panic!("expected Invalid {field}, got {other:?}"),
    }
}

#[test]
fn io() {
    let folder = tempfile::tempdir().unwrap();
    let error = Preset::read(folder.path().join("absent.json")).unwrap_err();
    assert!(matches!(error, PresetError::Io { .. }));
    assert!(error.to_string().contains("absent.json"), "{error}");
    assert!(matches!(Preset::read(folder.path()), Err(PresetError::Io { .. })));
    assert!(matches!(
        sample(1, 1, 4, 2).write(folder.path().join("no/folder.json")),
        Err(PresetError::Io { .. })
    ));
}

#[test]
fn too_large() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    std::fs::File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
    let error = Preset::read(&path).unwrap_err();
    assert!(matches!(error, PresetError::TooLarge { given, limit } if given == limit + 1), "{error}");
}

#[test]
fn not_a_preset() {
    for (bytes, hint) in [
        (&b""[..], "empty"),
        (b"   ", "neither"),
        (b"PK\x03\x04archive", "torch.save"),
        (b"\x80\x04\x95pickle", "pickle"),
        (b"GGUF\x03\0\0\0\0\0\0", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"[1, 2]", "array"),
        (b"\xff\xff\xff", "neither"),
    ] {
        let error = Preset::from_bytes(bytes).unwrap_err();
        assert!(matches!(error, PresetError::NotAPreset { .. }), "{error}");
        assert!(error.to_string().contains(hint), "{error}");
    }
    // A model's weights.
    let header = br#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.push(0);
    let error = Preset::from_bytes(&bytes).unwrap_err();
    assert!(matches!(error, PresetError::NotAPreset { .. }), "{error}");
    assert!(error.to_string().contains("weights"), "{error}");
}

#[test]
fn json() {
    let error = Preset::from_bytes(b"{\n  \"model\": 3\n}").unwrap_err();
    assert!(matches!(error, PresetError::Json { line: 2, column: 12, .. }), "{error}");
    let text = sample(1, 1, 4, 2).to_json_string().unwrap();
    for broken in [
        &text[..text.len() / 2],
        &format!("{text}{{}}"),
        "{}}",
        "{\"rank\": -1}",
        "{\"rank\": 1.5}",
        "{\"layers\": {}}",
        "{\"layers\": [{\"K\": {\"U\": [1, 2]}}]}",
        "{\"layers\": [{\"K\": {\"U\": [[NaN]]}}]}",
        "{\"layers\": [{\"K\": {\"U\": [[1e999]]}}]}",
        "{\"layers\": [{\"K\": {\"U\": [[1e39]]}}]}",
    ] {
        let error = Preset::from_bytes(broken.as_bytes()).unwrap_err();
        assert!(matches!(error, PresetError::Json { .. }), "{error}");
    }
    let pairing = text.replacen("half_split", "spiral", 1);
    let error = Preset::from_bytes(pairing.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("pairing \"spiral\", expected \"half_split\" or \"interleaved\""), "{error}");
    let deep = format!("{{\"kvlathe\": {{\"calibration\": {{\"a\": {}", "[".repeat(100_000));
    assert!(matches!(Preset::from_bytes(deep.as_bytes()), Err(PresetError::Json { .. })));
}

#[test]
fn safetensors() {
    let bytes = sample(1, 1, 4, 2).to_safetensors_bytes().unwrap();
    let mut longer = bytes.clone();
    longer.push(0);
    let mut endless = bytes.clone();
    endless[..8].fill(0xff);
    for broken in [&bytes[..bytes.len() - 1], &bytes[..100], &longer, &endless] {
        let error = Preset::from_bytes(broken).unwrap_err();
        assert!(matches!(error, PresetError::Safetensors { .. }), "{error}");
    }
}

#[test]
fn missing_key() {
    let full = tree(&sample(2, 2, 4, 2));
    let cases = [
        ("", "model", "model"),
        ("", "rank", "rank"),
        ("", "head_dim", "head_dim"),
        ("", "n_layers", "n_layers"),
        ("", "n_heads", "n_heads"),
        ("", "layers", "layers"),
        ("/kvlathe", "format_version", "kvlathe.format_version"),
        ("/kvlathe", "n_kv_heads", "kvlathe.n_kv_heads"),
        ("/kvlathe", "block_len", "kvlathe.block_len"),
        ("/kvlathe", "n_sinks", "kvlathe.n_sinks"),
        ("/kvlathe", "bits_per_value", "kvlathe.bits_per_value"),
        ("/layers/1", "K", "layers[1].K.U"),
        ("/layers/1/V", "U", "layers[1].V.U"),
        ("/layers/1/V", "mean", "layers[1].V.mean"),
        ("/layers/0/K/streams/1", "basis", "layers[0].K.streams[1].basis"),
        ("/layers/0/K/streams/1", "widths", "layers[0].K.streams[1].widths"),
    ];
    for (place, key, expected) in cases {
        let mut tree = full.clone();
        tree.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(key).expect(key);
        match read_tree(&tree) {
            Err(PresetError::MissingKey { key }) => assert_eq!(key, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn missing_tensor() {
    let bytes = sample(1, 1, 4, 2).to_safetensors_bytes().unwrap();
    // Rename a tensor in the header; the length stays.
    let broken = replace(&bytes, b"layers.0.value.widths", b"layers.0.value.wIdths");
    match Preset::from_bytes(&broken) {
        Err(PresetError::MissingKey { key }) => assert_eq!(key, "layers.0.value.widths"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tensor_of_another_type_or_shape() {
    let bytes = sample(1, 2, 4, 2).to_safetensors_bytes().unwrap();
    let broken = replace(&bytes, br#"{"dtype":"F16","shape":[4,2]"#, br#"{"dtype":"I16","shape":[4,2]"#);
    assert_invalid(Preset::from_bytes(&broken), "type of layers.0.key.shared.u");
    let broken = replace(&bytes, br#""shape":[2,4,4]"#, br#""shape":[4,4,2]"#);
    let error = Preset::from_bytes(&broken).unwrap_err();
    assert!(matches!(error, PresetError::Shape { layer: 0, side: Side::Key, .. }), "{error}");
    assert!(error.to_string().contains("[4, 4, 2]"), "{error}");
}

/// Replaces the first occurrence by something as long.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the pattern is there");
    let mut bytes = bytes.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn shape() {
    let full = tree(&sample(2, 2, 4, 2));
    let cases: [(&str, Value, &str, &str); 8] = [
        ("/layers/1/V/U", json!([[1.0], [0.0], [0.0], [0.0]]), "U", "[4, 1]"),
        ("/layers/1/V/U", json!([[1, 0], [0, 1], [0]]), "U", "2 in row 0 but 1 in row 2"),
        ("/layers/1/V/U", json!([]), "U", "[0, 0]"),
        ("/layers/1/V/mean", json!([0, 0, 0]), "mean", "[3]"),
        ("/layers/1/V/streams", json!([]), "streams", "[0]"),
        ("/layers/1/V/streams/1/basis", json!([[1, 2, 3, 4]]), "streams[1].basis", "[1, 4]"),
        ("/layers/1/V/streams/1/widths", json!([0]), "streams[1].widths", "[1]"),
        ("/layers/1/V/streams/0/importance", json!([0, 0, 0, 0, 0]), "streams[0].importance", "[5]"),
    ];
    for (place, value, expected_what, expected_given) in cases {
        let mut tree = full.clone();
        *tree.pointer_mut(place).unwrap() = value;
        match read_tree(&tree) {
            Err(PresetError::Shape { layer: 1, side: Side::Value, what, given, .. }) => {
                assert_eq!((what.as_str(), given.as_str()), (expected_what, expected_given));
            }
            other => panic!("{place}: {other:?}"),
        }
    }
    // A U of another rank than the metadata's names both shapes.
    let mut tree = tree(&seed_sample());
    tree["rank"] = 3.into();
    assert_eq!(
        message(read_tree(&tree)),
        "layer 0, V: `U` has shape [4, 2], expected [4, 3]; does it belong to another model?"
    );
}

#[test]
fn shape_in_memory() {
    let mut preset = sample(1, 1, 4, 2);
    preset.layers[0].key.shared.as_mut().unwrap().rank = 3;
    assert!(matches!(preset.validate(), Err(PresetError::Shape { layer: 0, side: Side::Key, .. })));
    let mut preset = sample(1, 1, 4, 2);
    preset.layers[0].value.streams[0].basis.pop();
    assert!(matches!(preset.validate(), Err(PresetError::Shape { layer: 0, side: Side::Value, .. })));
    // Streams need a kvlathe section that counts them.
    preset.meta.lathe = None;
    preset.layers[0].rope = None;
    assert!(matches!(preset.validate(), Err(PresetError::Shape { .. })));
}

#[test]
fn non_finite() {
    let full = tree(&sample(2, 1, 4, 2));
    for (place, field) in [
        ("/layers/1/K/U/0/1", "U"),
        ("/layers/1/K/mean/3", "mean"),
        ("/layers/1/K/streams/0/mean/0", "streams[0].mean"),
        ("/layers/1/K/streams/0/basis/2/2", "streams[0].basis"),
        ("/layers/1/K/streams/0/importance/0", "streams[0].importance"),
    ] {
        let mut tree = full.clone();
        *tree.pointer_mut(place).unwrap() = Value::Null;
        match read_tree(&tree) {
            Err(PresetError::NonFinite { layer: 1, side: Side::Key, what }) => assert_eq!(what, field),
            other => panic!("{place}: {other:?}"),
        }
    }
    let mut preset = sample(1, 1, 4, 2);
    preset.layers[0].key.streams[0].mean[0] = f32::INFINITY;
    assert!(matches!(preset.to_safetensors_bytes(), Err(PresetError::NonFinite { .. })));
}

#[test]
fn not_orthonormal() {
    let mut tree = tree(&seed_sample());
    tree["layers"][1]["K"]["U"] = json!([[1, 0], [0, 1.01], [0, 0], [0, 0]]);
    match read_tree(&tree) {
        Err(PresetError::NotOrthonormal { layer: 1, side: Side::Key, deviation }) => {
            assert!((deviation - 0.0201).abs() < 1e-6);
        }
        other => panic!("{other:?}"),
    }
    assert!(message(read_tree(&tree)).contains("by 2.01e-2, and 1e-3 is allowed"));
    tree["layers"][1]["K"]["U"] = json!([[1, 0], [0, 1.0004], [0, 0], [0, 0]]);
    read_tree(&tree).unwrap();
}

#[test]
fn unsupported_version() {
    let mut tree = tree(&sample(1, 1, 4, 2));
    tree["kvlathe"]["format_version"] = (FORMAT_VERSION + 1).into();
    let is_newer = |tree: &Value| {
        matches!(read_tree(tree), Err(PresetError::UnsupportedVersion { given: 5, supported: 4 }))
    };
    assert!(is_newer(&tree));
    assert_eq!(
        message(read_tree(&tree)),
        "this preset has format version 5 and this library reads up to 4; upgrade kvlathe"
    );
    // A newer version may have turned anything else around.
    tree["kvlathe"]["rope"] = "learnt".into();
    assert!(is_newer(&tree));
    tree["kvlathe"].as_object_mut().unwrap().remove("block_len");
    tree.as_object_mut().unwrap().remove("rank");
    assert!(is_newer(&tree));
}

#[test]
fn invalid() {
    let full = tree(&sample(2, 2, 4, 2));
    let cases: [(&str, Value, &str); 26] = [
        ("/n_layers", json!(3), "n_layers"),
        ("/n_layers", json!(0), "n_layers"),
        ("/n_layers", json!(1_000_000_000), "n_layers"),
        ("/head_dim", json!(0), "head_dim"),
        ("/head_dim", json!(1025), "head_dim"),
        ("/rank", json!(0), "rank"),
        ("/rank", json!(5), "rank"),
        ("/n_heads", json!(0), "n_heads"),
        ("/compression_ratio", json!(0.0), "compression_ratio"),
        ("/kvlathe/format_version", json!(0), "format_version"),
        ("/kvlathe/n_kv_heads", json!(0), "n_kv_heads"),
        ("/kvlathe/n_kv_heads", json!(4), "n_kv_heads"),
        ("/kvlathe/n_kv_heads", json!(6000), "n_kv_heads"),
        ("/kvlathe/block_len", json!(33), "block_len"),
        ("/kvlathe/n_sinks", json!(4097), "n_sinks"),
        ("/kvlathe/bits_per_value", json!(-0.5), "bits_per_value"),
        ("/kvlathe/fingerprint", json!("abc"), "fingerprint"),
        ("/kvlathe/rope/1/rotary_dim", json!(3), "rope[1].rotary_dim"),
        ("/kvlathe/rope/1/rotary_dim", json!(6), "rope[1].rotary_dim"),
        ("/kvlathe/rope/1/rotary_dim", json!(0), "rope[1].rotary_dim"),
        ("/kvlathe/rope/0/inv_freq", json!([1.0]), "rope[0].inv_freq"),
        ("/kvlathe/rope/0/inv_freq", json!([1.0, 0.0]), "rope[0].inv_freq"),
        ("/layers/1/rope", json!(2), "layers[1].rope"),
        ("/layers/1/K/streams/0/importance/1", json!(-1e-9), "layers[1].K.streams[0].importance"),
        ("/layers/1/K/streams/0/widths/1", json!(5), "layers[1].K.streams[0].widths"),
        ("/layers/1/K/streams/0/widths/1", json!(16), "layers[1].K.streams[0].widths"),
    ];
    for (place, value, field) in cases {
        let mut tree = full.clone();
        *tree.pointer_mut(place).unwrap() = value;
        assert_invalid(read_tree(&tree), field);
    }
}

#[test]
fn invalid_in_memory() {
    let mut preset = sample(2, 1, 4, 2);
    preset.meta.lathe.as_mut().unwrap().bits_per_value = f64::NAN;
    assert_invalid(preset.validate(), "bits_per_value");
    let mut preset = sample(2, 1, 4, 2);
    preset.meta.lathe.as_mut().unwrap().cache_fingerprint = "A".repeat(64);
    assert_invalid(preset.validate(), "kvlathe.cache_fingerprint");
    let mut preset = sample(2, 1, 4, 2);
    preset.meta.compression_ratio = f64::INFINITY;
    assert_invalid(preset.validate(), "compression_ratio");
    let mut preset = sample(2, 1, 4, 2);
    preset.layers.pop();
    assert_invalid(preset.validate(), "n_layers");
    let mut preset = seed_sample();
    preset.layers[0].rope = Some(0);
    assert_invalid(preset.validate(), "layers[0].rope");
}

#[test]
fn layers_that_the_metadata_does_not_count() {
    let bytes = sample(1, 1, 4, 2).to_safetensors_bytes().unwrap();
    let broken = replace(&bytes, b"layers.0.key.mean", b"layers.1.key.mean");
    assert_invalid(Preset::from_bytes(&broken), "n_layers");
}

/// Each is a number that some model has; all of them together would be tables of many gigabytes.
#[test]
fn more_streams_than_any_model_has() {
    let mut tree = tree(&sample(1, 1, 4, 2));
    tree["n_layers"] = 4096.into();
    tree["n_heads"] = 1024.into();
    tree["kvlathe"]["n_kv_heads"] = 1024.into();
    assert_invalid(read_tree(&tree), "n_layers · kvlathe.n_kv_heads");
}

/// What a reader would refuse is not written.
#[test]
fn records_that_are_too_long() {
    let mut preset = sample(1, 1, 4, 2);
    let measured = &mut preset.meta.lathe.as_mut().unwrap().measured;
    measured.insert("text".to_owned(), "x".repeat(1 << 20).into());
    assert_invalid(preset.to_json_string(), "bytes of kvlathe.measured");
    assert_invalid(preset.to_safetensors_bytes(), "bytes of kvlathe.measured");
}

#[test]
fn numbers_that_float16_cannot_hold() {
    let mut preset = sample(1, 1, 4, 2);
    preset.layers[0].value.streams[0].basis[5] = 1e6;
    assert!(preset.validate().is_ok(), "fine in memory");
    assert_invalid(preset.to_safetensors_bytes(), "layers[0].V.streams[0].basis");
    assert_invalid(preset.to_json_string(), "layers[0].V.streams[0].basis");
    let mut preset = sample(1, 1, 4, 2);
    preset.layers[0].value.streams[0].basis.iter_mut().skip(2).step_by(4).for_each(|number| *number = 1e-9);
    let error = preset.to_json_string().unwrap_err();
    assert!(error.to_string().contains("column 2"), "{error}");
}

#[test]
fn wrong_model() {
    let config = json!({"model_type": "llama", "hidden_size": 576});
    let mut preset = sample(1, 1, 4, 2);
    let error = preset.check_model(&config).unwrap_err();
    assert!(matches!(error, PresetError::WrongModel { .. }));
    assert!(error.to_string().contains("example/tiny"), "{error}");
    preset.meta.lathe.as_mut().unwrap().fingerprint = kvlathe_preset::fingerprint(&config);
    preset.check_model(&config).unwrap();
    preset.meta.lathe.as_mut().unwrap().fingerprint.clear();
    preset.check_model(&config).unwrap();
    seed_sample().check_model(&config).unwrap();
}

#[test]
fn extension() {
    for name in ["preset", "preset.pt", "preset.json.gz"] {
        let error = sample(1, 1, 4, 2).write(name).unwrap_err();
        assert!(matches!(error, PresetError::Extension { .. }));
        let text = error.to_string();
        assert!(text.contains(".safetensors") && text.contains(".json") && text.contains(name), "{text}");
    }
}
