//! Files of versions 1 and 2 stay readable, version 2 is written as it always was, and so is version 3.
//!
//! `KVLATHE_BLESS=1 cargo test -p kvlathe-preset --test golden` writes the lathe files anew. Do that only
//! together with a new format version.

mod common;

use std::path::PathBuf;

use common::{bits, partial_sample, sample};
use kvlathe_preset::{Preset, Side};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn seed() {
    let preset = Preset::read(golden("seed.json")).unwrap();
    assert_eq!(preset.meta.model, "example/seed");
    assert_eq!((preset.meta.rank, preset.meta.head_dim, preset.meta.n_heads), (2, 4, 4));
    assert_eq!(preset.meta.compression_ratio, 4.0);
    assert!(preset.is_seed());
    assert!(preset.shared(0, Side::Key).is_none());
    let value = preset.shared(0, Side::Value).unwrap();
    assert_eq!(value.u, [0.6, 0.0, 0.8, 0.0, 0.0, 1.0, 0.0, 0.0]);
    assert_eq!(value.mean, [0.125, -0.25, 0.0, 1.5]);
    let key = preset.shared(1, Side::Key).unwrap();
    assert_eq!(key.u, [0.5, 0.5, 0.5, -0.5, 0.5, 0.5, 0.5, -0.5]);
    assert!(preset.shared(1, Side::Value).is_some());
}

#[test]
fn lathe() {
    let expected = sample(3, 2, 4, 2);
    if std::env::var_os("KVLATHE_BLESS").is_some() {
        expected.write(golden("lathe-v3.json")).unwrap();
        expected.write(golden("lathe-v3.safetensors")).unwrap();
    }
    assert_written_as(&expected, "lathe-v3");
}

/// Version 4 is that of presets whose layers differ.
#[test]
fn version_4() {
    let expected = partial_sample();
    if std::env::var_os("KVLATHE_BLESS").is_some() {
        expected.write(golden("lathe-v4.json")).unwrap();
        expected.write(golden("lathe-v4.safetensors")).unwrap();
    }
    assert_written_as(&expected, "lathe-v4");
}

/// The same preset as it was in version 2.
#[test]
fn version_2() {
    let mut expected = sample(3, 2, 4, 2);
    expected.meta.lathe.as_mut().unwrap().format_version = 2;
    assert_written_as(&expected, "lathe-v2");
}

fn assert_written_as(expected: &Preset, name: &str) {
    let text = std::fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
    assert_eq!(expected.to_json_string().unwrap(), text);
    let expected = expected.rounded();
    for name in [format!("{name}.json"), format!("{name}.safetensors")] {
        let preset = Preset::read(golden(&name)).unwrap();
        assert_eq!(preset, expected, "{name}");
        assert_eq!(bits(&preset), bits(&expected), "{name}");
    }
}

/// The same preset as it was in version 1, which had no widths of 1 and 3.
#[test]
fn version_1() {
    let [text, tensors] =
        ["lathe-v1.json", "lathe-v1.safetensors"].map(|name| Preset::read(golden(name)).unwrap());
    assert_eq!((bits(&text), &text), (bits(&tensors), &tensors));
    let lathe = text.lathe().unwrap();
    assert_eq!((lathe.format_version, lathe.bits_per_value, lathe.block_len), (1, 2.7, 32));
    let widths: Vec<u8> = text.stream(0, Side::Key, 0).unwrap().widths.clone();
    assert!(widths.iter().all(|width| [0, 2, 4, 8].contains(width)), "{widths:?}");
}
