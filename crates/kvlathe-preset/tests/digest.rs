//! The digest: known answers, what changes it, and what does not.
//!
//! `python/tests/test_digest.py` computes it anew from the specification; the known answers are its.

mod common;

use std::collections::HashSet;
use std::path::PathBuf;

use common::{sample, seed_sample};
use kvlathe_preset::{Digest, LatheMeta, LayerPreset, Pairing, Preset, Rope, Side, StreamPreset};

fn golden(name: &str) -> Preset {
    Preset::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

fn digest(preset: &Preset) -> Digest {
    preset.digest().expect("a preset with streams")
}

#[test]
fn known_answers() {
    let version_1 = "9c57c23122d4c3b0316ee623253c8c5b874be41b99a5d5113ca43c0c986eb0e2";
    let version_2 = "76e3ceb9de0cf3b6b64569f7296fb266d8190684436e937b7713006d7953e98b";
    // The same preset as in version 2; that of version 1 has other widths.
    for (version, expected) in [(1, version_1), (2, version_2), (3, version_2)] {
        for extension in ["json", "safetensors"] {
            let name = format!("lathe-v{version}.{extension}");
            assert_eq!(digest(&golden(&name)).to_string(), expected, "{name}");
        }
    }
}

#[test]
fn seed_presets_have_none() {
    assert_eq!(seed_sample().digest(), None);
    assert_eq!(golden("seed.json").digest(), None);
}

/// A preset that was never rounded, and what readers see of it.
#[test]
fn memory_and_both_files_agree() {
    let preset = sample(3, 2, 8, 4);
    assert_ne!(preset, preset.rounded());
    let json = Preset::from_bytes(preset.to_json_string().unwrap().as_bytes()).unwrap();
    let safetensors = Preset::from_bytes(&preset.to_safetensors_bytes().unwrap()).unwrap();
    for other in [preset.rounded(), json, safetensors] {
        assert_eq!(digest(&other), digest(&preset));
    }
}

fn lathe(preset: &mut Preset) -> &mut LatheMeta {
    preset.meta.lathe.as_mut().unwrap()
}

fn rope(pairing: Pairing, inv_freq: &[f64]) -> Rope {
    Rope::new(pairing, 2 * inv_freq.len(), inv_freq.to_vec()).unwrap()
}

fn streams(preset: &mut Preset, layer: usize, side: Side) -> &mut Vec<StreamPreset> {
    let LayerPreset { key, value, .. } = &mut preset.layers[layer];
    match side {
        Side::Key => &mut key.streams,
        Side::Value => &mut value.streams,
    }
}

type Edit = Box<dyn Fn(&mut Preset)>;

#[test]
fn every_ingredient_changes_it() {
    let original = sample(3, 2, 4, 2);
    let mut edits: Vec<Edit> = vec![
        Box::new(|preset| lathe(preset).block_len = 64),
        Box::new(|preset| lathe(preset).n_sinks = 5),
        Box::new(|preset| lathe(preset).rope[0] = rope(Pairing::HalfSplit, &[0.5, 0.25])),
        Box::new(|preset| lathe(preset).rope[0] = rope(Pairing::HalfSplit, &[0.5, 0.25_f64.next_up()])),
        Box::new(|preset| lathe(preset).rope[0] = rope(Pairing::HalfSplit, &[0.5])),
        Box::new(|preset| lathe(preset).rope[0] = rope(Pairing::Interleaved, &[0.5, 0.25])),
        Box::new(|preset| preset.layers[0].rope = None),
        Box::new(|preset| preset.layers[2].rope = Some(0)),
        Box::new(|preset| preset.layers.swap(0, 1)),
        Box::new(|preset| {
            let LayerPreset { key, value, .. } = &mut preset.layers[1];
            std::mem::swap(key, value);
        }),
    ];
    for (layer, side, head) in (0..3)
        .flat_map(|layer| Side::ALL.map(|side| (layer, side)))
        .flat_map(|(layer, side)| [(layer, side, 0), (layer, side, 1)])
    {
        let mut edit = |edit: fn(&mut StreamPreset)| {
            edits.push(Box::new(move |preset| edit(&mut streams(preset, layer, side)[head])));
        };
        edit(|stream| stream.mean[3] += 0.5);
        edit(|stream| stream.basis[6] = -stream.basis[6]);
        edit(|stream| stream.basis.swap(1, 2));
        edit(|stream| stream.importance[0] = stream.importance[0].next_up());
        edit(|stream| stream.widths[2] = if stream.widths[2] == 4 { 3 } else { 4 });
    }
    let mut presets = vec![original.clone(), sample(2, 2, 4, 2), sample(3, 1, 4, 2), sample(3, 2, 6, 2)];
    for edit in &edits {
        let mut preset = original.clone();
        edit(&mut preset);
        preset.validate().unwrap();
        presets.push(preset);
    }
    let digests: HashSet<Digest> = presets.iter().map(digest).collect();
    assert_eq!(digests.len(), presets.len());
}

#[test]
fn nothing_else_changes_it() {
    let edits: [Edit; 12] = [
        Box::new(|preset| preset.meta.model = "another".to_owned()),
        Box::new(|preset| preset.meta.n_heads *= 2),
        Box::new(|preset| preset.meta.compression_ratio = 1.0),
        Box::new(|preset| lathe(preset).format_version = 1),
        Box::new(|preset| lathe(preset).library_version = "99".to_owned()),
        Box::new(|preset| lathe(preset).bits_per_value = 1.0),
        Box::new(|preset| {
            lathe(preset).fingerprint.clear();
            lathe(preset).cache_fingerprint = "ab".repeat(32);
            lathe(preset).model_type.clear();
        }),
        Box::new(|preset| lathe(preset).created = "1999-12-31".to_owned()),
        Box::new(|preset| {
            lathe(preset).calibration.clear();
            lathe(preset).measured.clear();
        }),
        Box::new(|preset| {
            let shared = preset.layers[0].key.shared.as_mut().unwrap();
            shared.mean[0] += 1.0;
            shared.u.iter_mut().for_each(|number| *number = -*number);
        }),
        // The same rotations in another order, and one that no layer has.
        Box::new(|preset| {
            lathe(preset).rope.reverse();
            lathe(preset).rope.push(rope(Pairing::Interleaved, &[0.125]));
            preset.layers.iter_mut().for_each(|layer| layer.rope = layer.rope.map(|index| 1 - index));
        }),
        // Float16 has no such number: a file holds the same.
        Box::new(|preset| {
            let mean = &mut preset.layers[1].value.streams[0].mean[0];
            *mean = mean.next_up();
        }),
    ];
    let original = sample(3, 2, 4, 2).rounded();
    for (index, edit) in edits.iter().enumerate() {
        let mut preset = original.clone();
        edit(&mut preset);
        preset.validate().unwrap();
        assert_ne!(preset, original, "edit {index}");
        assert_eq!(digest(&preset), digest(&original), "edit {index}");
    }
}
