//! Damaged files: always an answer, never a panic. What memory hostile ones take is measured in `fuzz/tests/preset_memory.rs`.

mod common;

use std::sync::LazyLock;

use common::{sample, seed_sample};
use kvlathe_preset::Preset;
use proptest::prelude::*;

static FILES: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| {
    let (lathe, seed) = (sample(2, 2, 4, 2), seed_sample());
    [
        lathe.to_json_string().unwrap().into_bytes(),
        lathe.to_safetensors_bytes().unwrap(),
        seed.to_json_string().unwrap().into_bytes(),
        seed.to_safetensors_bytes().unwrap(),
    ]
});

#[test]
fn every_truncation_is_refused() {
    for file in FILES.iter() {
        // The JSON's last byte is a line feed, and does without.
        for len in 0..file.len() - 1 {
            assert!(Preset::from_bytes(&file[..len]).is_err(), "{len} of {} bytes", file.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is accepted after damage is valid and can be written again.
    #[test]
    fn damage_never_panics(
        which in 0..4_usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = FILES[which].clone();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(preset) = Preset::from_bytes(&bytes) {
            prop_assert!(preset.validate().is_ok());
        }
    }

    /// Damage to structure rather than to bytes: digits for digits, brackets for brackets.
    #[test]
    fn swapped_pieces_never_panic(
        which in 0..4_usize,
        a in any::<prop::sample::Index>(),
        b in any::<prop::sample::Index>(),
        len in 1..40_usize,
    ) {
        let mut bytes = FILES[which].clone();
        let (a, b) = (a.index(bytes.len() - len), b.index(bytes.len() - len));
        bytes.copy_within(a..a + len, b);
        if let Ok(preset) = Preset::from_bytes(&bytes) {
            prop_assert!(preset.validate().is_ok());
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Preset::from_bytes(&bytes);
    }
}
