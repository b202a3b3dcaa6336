//! What holds for every preset that a reader accepts, whatever the file.

use kvlathe::preset::{Preset, PresetError};

use crate::allocation::peak_of;

/// Most bytes that reading a preset of `len` bytes may hold at once.
///
/// Numbers take 1 to 2 bytes in a file and 4 in memory, buffers double as they grow, and free-form JSON (which is
/// limited) takes a hundred times its text.
#[must_use]
pub const fn most_bytes_for(len: usize) -> usize {
    let free_form = if len < 2 << 20 { len } else { 2 << 20 };
    16 * len + 128 * free_form + (64 << 10)
}

/// Reads a preset within the memory that its file allows.
pub(crate) fn read(bytes: &[u8]) -> Option<Preset> {
    let (result, peak) = peak_of(|| Preset::from_bytes(bytes));
    let most = most_bytes_for(bytes.len());
    assert!(peak <= most, "{peak} bytes for a file of {}, at most {most} are right", bytes.len());
    match result {
        Ok(preset) => Some(preset),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

/// Writes an accepted preset, reads it again, makes codecs of it.
pub(crate) fn check(preset: &Preset) {
    preset.validate().expect("only valid presets are read");
    let upgraded = kvlathe::upgraded(preset.clone());
    upgraded.validate().expect("an older preset stays valid");
    assert_eq!(kvlathe::upgraded(upgraded.clone()), upgraded);
    match (preset.to_json_string(), preset.to_safetensors_bytes()) {
        (Ok(json), Ok(safetensors)) => {
            let from_json = Preset::from_bytes(json.as_bytes()).expect("what was written can be read");
            let from_safetensors = Preset::from_bytes(&safetensors).expect("what was written can be read");
            assert_eq!(from_json, preset.rounded());
            assert_eq!(from_json, from_safetensors);
            assert_eq!(from_json.to_json_string().expect("twice"), json);
        }
        // A text may hold numbers beyond float16, or a U that is not orthonormal once rounded. Either way the writers agree.
        (
            Err(PresetError::Invalid { .. } | PresetError::NotOrthonormal { .. }),
            Err(PresetError::Invalid { .. } | PresetError::NotOrthonormal { .. }),
        ) => {}
        (json, safetensors) => panic!("{:?} and {:?}", json.err(), safetensors.err()),
    }
    // Some bases have no inverse, which only the codec finds out.
    if let Ok(codings) = kvlathe::layer_codings(preset) {
        assert_eq!(codings.len(), preset.layers().len());
    }
    if let Ok(other) = kvlathe::with_bits(preset, 3.0) {
        other.validate().expect("another rate is as valid");
    }
}
