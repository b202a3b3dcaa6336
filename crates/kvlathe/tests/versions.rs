//! Presets of older versions, at today's rates.

use std::path::PathBuf;

use kvlathe::cache::Coding;
use kvlathe::preset::{Preset, UNIFORM_VERSION};
use kvlathe::{
    Error, Side, default_policy, expected_costs, layer_codings, side_bits_per_value, upgraded, with_bits,
};

fn version(version: u32) -> Preset {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kvlathe-preset/tests/golden");
    Preset::read(folder.join(format!("lathe-v{version}.safetensors"))).unwrap()
}

/// Version, rate and whether anything was measured.
fn stated(preset: &Preset) -> (u32, f64, bool) {
    let lathe = preset.lathe().unwrap();
    (lathe.format_version, lathe.bits_per_value, !lathe.measured.is_empty())
}

#[test]
fn upgrading_restates_the_rate_and_drops_what_was_measured() {
    let old = version(1);
    assert_eq!(stated(&old), (1, 2.7, true));
    let widths: Vec<f64> = old
        .layers()
        .iter()
        .flat_map(|layer| layer.key.streams.iter().chain(&layer.value.streams))
        .map(|stream| stream.mean_width())
        .collect();
    let side_bits = side_bits_per_value(&old);
    assert_eq!(side_bits, 8.0 * (2.0 + 32.0 + 2.0) / (4.0 * 32.0));
    let rate = widths.iter().sum::<f64>() / widths.len() as f64 + side_bits;
    let new = upgraded(old.clone());
    assert_eq!(stated(&new), (UNIFORM_VERSION, rate, false));
    assert_eq!((new.layers(), upgraded(new.clone())), (old.layers(), new.clone()));
    assert_eq!(new.digest(), old.digest());
}

/// Version 2 has the same codes and rates as version 3.
#[test]
fn upgrading_version_2_changes_the_version_only() {
    let mut old = version(2);
    assert_eq!(stated(&old), (2, 2.7, true));
    let new = upgraded(old.clone());
    assert_eq!(new.digest(), old.digest());
    assert_eq!(new, version(3));
    old.meta.lathe.as_mut().unwrap().format_version = UNIFORM_VERSION;
    assert_eq!(new, old);
}

#[test]
fn seed_presets_are_of_no_version() {
    let mut seed = version(3);
    seed.meta.lathe = None;
    assert_eq!(upgraded(seed.clone()), seed);
}

#[test]
fn another_rate_is_another_digest() {
    let preset = version(3);
    let digests = [4.0, 5.0, 6.0].map(|bits| with_bits(&preset, bits).unwrap().digest());
    assert!(digests.iter().all(|digest| *digest != preset.digest() && digest.is_some()));
    assert!(digests[0] != digests[1] && digests[1] != digests[2] && digests[0] != digests[2]);
}

#[test]
fn all_widths_zero_are_a_rate_but_no_rate_is_none() {
    let mut dropped = version(1);
    for layer in &mut dropped.layers {
        for stream in layer.key.streams.iter_mut().chain(&mut layer.value.streams) {
            stream.widths.fill(0);
        }
    }
    assert_eq!(stated(&upgraded(dropped.clone())).1, side_bits_per_value(&dropped));
    dropped.meta.lathe.as_mut().unwrap().bits_per_value = 0.0;
    assert_eq!(stated(&upgraded(dropped)).1, 0.0);
}

#[test]
fn another_rate_of_an_old_preset_is_of_this_version() {
    let (version, rate, is_measured) = stated(&with_bits(&version(1), 5.0).unwrap());
    assert_eq!((version, is_measured), (UNIFORM_VERSION, false));
    assert!(rate <= 5.0 && rate > 4.0, "{rate}");
}

/// Layers that are not coded have no share in the rate; the others have theirs by how many values they hold.
#[test]
fn the_rate_of_a_preset_whose_layers_differ() {
    let preset = version(4);
    let lathe = preset.lathe().unwrap();
    // Of the golden file: nothing, 2 heads of 4 and 4, 1 head of 6 and 4, blocks of 32.
    let side_bytes = 4.0 * (2.0 + 32.0 + 2.0) + (2.0 + 32.0 + 3.0) + (2.0 + 32.0 + 2.0);
    let side_bits = 8.0 * side_bytes / 32.0 / (4.0 * 4.0 + 6.0 + 4.0);
    assert!((side_bits_per_value(&preset) - side_bits).abs() < 1e-12);
    assert_eq!((lathe.format_version, upgraded(preset.clone())), (4, preset.clone()));
    let rated = with_bits(&preset, side_bits + 3.0).unwrap();
    let streams =
        || rated.layers().iter().flat_map(|layer| layer.key.streams.iter().chain(&layer.value.streams));
    assert!(streams().all(|stream| stream.widths.len() == stream.mean.len()));
    let bits: f64 = streams().map(|stream| stream.mean_width() * stream.mean.len() as f64).sum();
    assert!(bits / 26.0 <= 3.0 && bits / 26.0 > 2.5, "{bits}");
    assert!((rated.lathe().unwrap().bits_per_value - bits / 26.0 - side_bits).abs() < 1e-12);
    let costs = expected_costs(&rated).unwrap();
    assert_eq!(costs[0], [0.0, 0.0]);
    assert!(costs[1..].iter().flatten().all(|cost| *cost > 0.0));
    let codings = layer_codings(&rated).unwrap();
    assert!(matches!(codings[0].key, Coding::Exact));
    assert!(matches!(codings[2].key, Coding::Blocks(_)));
    // Each layer's cache has the layer's own sizes.
    for (layer, codings) in codings.iter().enumerate() {
        let cache = codings.cache::<f32>(default_policy(&rated), 1);
        match rated.meta().layer_shape(layer) {
            None => assert!(matches!(cache, Err(Error::NotCoded))),
            Some(shape) => {
                let cache = cache.unwrap();
                assert_eq!(cache.n_heads(), shape.n_kv_heads);
                assert!(Side::ALL.iter().all(|side| cache.head_dim(*side) == shape.dim(*side)));
            }
        }
    }
}
