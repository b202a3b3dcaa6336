//! What is written is what is read, in both formats, bit for bit.

mod common;

use common::{bits, orthonormal, read_tree, sample, seed_sample, tree};
use kvlathe_preset::{Pairing, Preset, PresetError, Rope, Side};

#[test]
fn both_formats_give_the_rounded_preset() {
    let mut with_both_fingerprints = sample(1, 1, 2, 1);
    with_both_fingerprints.meta.lathe.as_mut().unwrap().cache_fingerprint = "fedcba9876543210".repeat(4);
    for preset in [sample(4, 3, 8, 5), sample(1, 1, 2, 1), with_both_fingerprints, seed_sample()] {
        let from_json = Preset::from_bytes(preset.to_json_string().unwrap().as_bytes()).unwrap();
        let from_safetensors = Preset::from_bytes(&preset.to_safetensors_bytes().unwrap()).unwrap();
        let rounded = preset.rounded();
        assert_eq!(from_json, rounded);
        assert_eq!(from_safetensors, rounded);
        assert_eq!(bits(&from_json), bits(&rounded));
        assert_eq!(bits(&from_safetensors), bits(&rounded));
    }
}

#[test]
fn converting_back_and_forth_changes_no_byte() {
    let preset = sample(3, 2, 8, 4);
    let json = preset.to_json_string().unwrap();
    let safetensors = preset.to_safetensors_bytes().unwrap();
    assert_eq!(Preset::from_bytes(json.as_bytes()).unwrap().to_safetensors_bytes().unwrap(), safetensors);
    assert_eq!(Preset::from_bytes(&safetensors).unwrap().to_json_string().unwrap(), json);
}

#[test]
fn rounding_is_bounded_and_idempotent() {
    let preset = sample(2, 2, 16, 4);
    let rounded = preset.rounded();
    assert_eq!(bits(&rounded.rounded()), bits(&rounded));
    let (exact, stored) = (preset.stream(1, Side::Key, 1).unwrap(), rounded.stream(1, Side::Key, 1).unwrap());
    for (x, y) in exact.basis.iter().zip(&stored.basis) {
        assert!((x - y).abs() <= (x.abs() * 2.0_f32.powi(-11)).max(2.0_f32.powi(-25)), "{x} became {y}");
    }
    assert_eq!(exact.importance, stored.importance);
}

#[test]
fn odd_numbers_survive() {
    let mut preset = sample(1, 1, 4, 2);
    let stream = &mut preset.layers[0].key.streams[0];
    // The smallest and largest float16, negative zero, and float32 that are hard to print.
    stream.mean = vec![-0.0, 5.960_464_5e-8, 65504.0, -6.103_515_6e-5];
    stream.importance = vec![f32::MIN_POSITIVE, f32::MAX, 1.0e-45, 8_388_609.5];
    preset.layers[0].value.shared.as_mut().unwrap().mean = vec![-0.0, 3.402_823e38, 1.0 / 3.0, 1.1e-38];
    let lathe = preset.meta.lathe.as_mut().unwrap();
    lathe.rope[0] = Rope::new(Pairing::HalfSplit, 4, vec![1.0 / 3.0, 5e-324]).unwrap();
    lathe.bits_per_value = 0.1 + 0.2;
    let json = Preset::from_bytes(preset.to_json_string().unwrap().as_bytes()).unwrap();
    let safetensors = Preset::from_bytes(&preset.to_safetensors_bytes().unwrap()).unwrap();
    assert_eq!(bits(&json), bits(&preset.rounded()));
    assert_eq!(bits(&safetensors), bits(&preset.rounded()));
    assert_eq!(json.meta, preset.meta);
    assert_eq!(safetensors.meta, preset.meta);
}

#[test]
fn seed_readers_find_their_keys() {
    let preset = sample(3, 2, 8, 5);
    let tree = tree(&preset);
    for (key, value) in [("rank", 5), ("head_dim", 8), ("n_layers", 3), ("n_heads", 6)] {
        assert_eq!(tree[key], value, "{key}");
    }
    assert_eq!(tree["model"], "example/tiny");
    assert!(tree["compression_ratio"].is_f64());
    let layers = tree["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3);
    for layer in layers {
        for side in ["K", "V"] {
            let u = layer[side]["U"].as_array().unwrap();
            assert_eq!(u.len(), 8);
            assert!(u.iter().all(|row| row.as_array().unwrap().len() == 5));
            assert_eq!(layer[side]["mean"].as_array().unwrap().len(), 8);
        }
    }
    // Take our keys away, as a seed reader does, and a valid seed preset is left.
    let mut stripped = tree.clone();
    stripped.as_object_mut().unwrap().remove("kvlathe");
    let seed = read_tree(&stripped).unwrap();
    assert!(seed.is_seed());
    assert_eq!(seed.shared(2, Side::Key), preset.rounded().shared(2, Side::Key));
}

#[test]
fn seed_presets_are_written_without_our_keys() {
    let tree = tree(&seed_sample());
    assert!(tree.get("kvlathe").is_none());
    let layers = tree["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer.get("rope").is_none() && layer["V"].get("streams").is_none()));
    assert!(layers[0].get("K").is_none());
}

#[test]
fn seed_presets_may_leave_things_out() {
    let mut tree = tree(&seed_sample());
    tree.as_object_mut().unwrap().remove("compression_ratio");
    tree["layers"][1]["V"] = serde_json::Value::Null;
    tree["calibrated_by"] = "somebody".into();
    tree["layers"][0]["V"]["explained_variance"] = 0.99.into();
    let preset = read_tree(&tree).unwrap();
    assert_eq!(preset.meta.compression_ratio, 16.0 * 4.0 / (8.0 * 2.0));
    assert!(preset.shared(1, Side::Value).is_none() && preset.shared(1, Side::Key).is_some());
}

#[test]
fn a_byte_order_mark_and_white_space_are_skipped() {
    let text = format!("\u{feff}\r\n\t {}", seed_sample().to_json_string().unwrap());
    Preset::from_bytes(text.as_bytes()).unwrap();
}

#[test]
fn files_are_told_by_content_and_replaced_whole() {
    let folder = tempfile::tempdir().unwrap();
    let preset = sample(2, 1, 4, 2);
    for name in ["preset.json", "preset.safetensors", "PRESET.SafeTensors"] {
        let path = folder.path().join(name);
        std::fs::write(&path, "something old").unwrap();
        preset.write(&path).unwrap();
        assert_eq!(Preset::read(&path).unwrap(), preset.rounded());
    }
    let disguised = folder.path().join("actually-safetensors.json");
    std::fs::rename(folder.path().join("preset.safetensors"), &disguised).unwrap();
    assert_eq!(Preset::read(&disguised).unwrap(), preset.rounded());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "temporary files are left");
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preset.json");
    let mut preset = sample(2, 1, 4, 2);
    preset.write(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    preset.meta.rank = 3;
    assert!(preset.write(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // A folder stands in the way, so the rename fails.
    let blocked = folder.path().join("blocked.json");
    std::fs::create_dir_all(blocked.join("inside")).unwrap();
    assert!(matches!(sample(1, 1, 4, 2).write(&blocked), Err(PresetError::Io { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// The first byte of a safetensors file is the low byte of a length, so it may look like the start of a JSON
/// text.
#[test]
fn safetensors_that_begin_like_json_are_recognised() {
    let mut preset = sample(1, 1, 2, 1);
    let mut seen = Vec::new();
    // The header is padded to a multiple of 8: 0x20, a blank, and 0x78 occur, 0x7b after padding by hand.
    for len in 0..256 {
        preset.meta.model = "m".repeat(len);
        let bytes = preset.to_safetensors_bytes().unwrap();
        seen.push(bytes[0]);
        assert_eq!(Preset::from_bytes(&bytes).unwrap(), preset.rounded());
    }
    assert!(seen.contains(&b' '));
    let bytes = preset.to_safetensors_bytes().unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let padding = (0x7b + 256 - header_len % 256) % 256;
    let mut padded = ((header_len + padding) as u64).to_le_bytes().to_vec();
    padded.extend(&bytes[8..8 + header_len]);
    padded.extend(std::iter::repeat_n(b' ', padding));
    padded.extend(&bytes[8 + header_len..]);
    assert_eq!(padded[0], b'{');
    assert_eq!(Preset::from_bytes(&padded).unwrap(), preset.rounded());
}

/// 30 layers, 3 KV heads, head_dim 64.
#[test]
fn smollm2_fits_in_2_mb() {
    for rank in [32, 48] {
        let bytes = sample(30, 3, 64, rank).to_safetensors_bytes().unwrap();
        assert!(bytes.len() < 2_000_000, "rank {rank}: {} bytes", bytes.len());
    }
}

#[test]
fn float16_keeps_any_orthonormal_basis_within_tolerance() {
    for head_dim in [64, 128] {
        let mut preset = sample(1, 1, head_dim, head_dim);
        // All entries equal in magnitude, so that all rounding errors have the same sign: the worst case.
        let scale = 1.0 / (head_dim as f32).sqrt();
        let hadamard = |at: usize| {
            if ((at / head_dim) & (at % head_dim)).count_ones().is_multiple_of(2) { scale } else { -scale }
        };
        preset.layers[0].key.shared.as_mut().unwrap().u = (0..head_dim * head_dim).map(hadamard).collect();
        let mut random = common::Random::new(1);
        preset.layers[0].value.shared.as_mut().unwrap().u = orthonormal(head_dim, head_dim, &mut random);
        Preset::from_bytes(&preset.to_safetensors_bytes().unwrap()).unwrap();
    }
}
