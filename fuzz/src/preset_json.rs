//! Presets as JSON: the input is the file.

use crate::preset;

/// Reads a file.
pub(crate) fn run(bytes: &[u8]) {
    if let Some(preset) = preset::read(bytes) {
        preset::check(&preset);
    }
}
