//! Presets of older versions, at today's rates.

use std::path::PathBuf;

use kvlathe::preset::{FORMAT_VERSION, Preset};
use kvlathe::{side_bits_per_value, upgraded, with_bits};

fn version_1() -> Preset {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kvlathe-preset/tests/golden/lathe-v1.safetensors");
    Preset::read(path).unwrap()
}

/// Version, rate and whether anything was measured.
fn stated(preset: &Preset) -> (u32, f64, bool) {
    let lathe = preset.lathe().unwrap();
    (lathe.format_version, lathe.bits_per_value, !lathe.measured.is_empty())
}

#[test]
fn upgrading_restates_the_rate_and_drops_what_was_measured() {
    let old = version_1();
    assert_eq!(stated(&old), (1, 2.7, true));
    let widths: Vec<f64> = old
        .layers()
        .iter()
        .flat_map(|layer| layer.key.streams.iter().chain(&layer.value.streams))
        .map(|stream| stream.mean_width())
        .collect();
    let side_bits = side_bits_per_value(4, 32);
    assert_eq!(side_bits, 8.0 * (2.0 + 32.0 + 2.0) / (4.0 * 32.0));
    let rate = widths.iter().sum::<f64>() / widths.len() as f64 + side_bits;
    let new = upgraded(old.clone());
    assert_eq!(stated(&new), (FORMAT_VERSION, rate, false));
    assert_eq!((new.layers(), upgraded(new.clone())), (old.layers(), new.clone()));
}

#[test]
fn all_widths_zero_are_a_rate_but_no_rate_is_none() {
    let mut dropped = version_1();
    for layer in &mut dropped.layers {
        for stream in layer.key.streams.iter_mut().chain(&mut layer.value.streams) {
            stream.widths.fill(0);
        }
    }
    assert_eq!(stated(&upgraded(dropped.clone())).1, side_bits_per_value(4, 32));
    dropped.meta.lathe.as_mut().unwrap().bits_per_value = 0.0;
    assert_eq!(stated(&upgraded(dropped)).1, 0.0);
}

#[test]
fn another_rate_of_an_old_preset_is_of_this_version() {
    let (version, rate, is_measured) = stated(&with_bits(&version_1(), 5.0).unwrap());
    assert_eq!((version, is_measured), (FORMAT_VERSION, false));
    assert!(rate <= 5.0 && rate > 4.0, "{rate}");
}
