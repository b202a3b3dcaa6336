//! Preset files: what calibration learnt about a model, on disk.
//!
//! A *preset* holds, for every layer of a model and for its keys (K) and values (V) apart, the numbers that
//! the codec needs: means, bases, and how many bits each coefficient gets. This crate is data, files and
//! checks. It knows nothing of tensors, models or the codec, so a preset can be inspected, converted and
//! verified anywhere.
//!
//! Two generations of preset share one model, [`Preset`]:
//!
//! | | seed preset | kvlathe preset |
//! |---|---|---|
//! | [`Meta::lathe`] | `None` | `Some` |
//! | per layer and side | one basis `U` shared by the heads, flat int8 | the same `U`, plus one [`StreamPreset`] per KV head |
//! | files | JSON (or safetensors) | safetensors (or JSON) |
//!
//! Every kvlathe preset is also a complete seed preset, so older readers can use it. `docs/preset_format.md`
//! specifies both files to the byte.
//!
//! # What a reader may rely on
//!
//! * [`Preset::read`] returns only presets that pass [`Preset::validate`]: shapes fit, every number is
//!   finite, `U` is orthonormal, every width is one the codec has.
//! * A hostile file yields a [`PresetError`], never a panic, and a size claimed by a file is believed only
//!   after the bytes behind it were seen. Nothing here executes what it reads.
//! * Large arrays are stored as float16. [`Preset::rounded`] returns what a reader will see; the relative
//!   error of each number is at most 2⁻¹¹ (absolute 2⁻²⁵ below 2⁻¹⁴). Both formats give bit-identical
//!   presets.
//! * [`Preset::write`] replaces a file as a whole or leaves it as it was.
//!
//! # Example
//!
//! ```
//! use kvlathe_preset::Preset;
//!
//! let text = r#"{
//!   "model": "tiny", "rank": 1, "head_dim": 2, "n_layers": 1, "n_heads": 4,
//!   "layers": [{"V": {"U": [[0.6], [0.8]], "mean": [0.1, -0.2]}}]
//! }"#;
//! let preset = Preset::from_bytes(text.as_bytes())?;
//! assert_eq!(preset.meta().compression_ratio, 4.0); // 16 bits × 2 dimensions against 8 bits × rank 1
//! assert!(preset.layers()[0].key.shared.is_none()); // no "K": keys stay as they are
//!
//! let broken = text.replace("0.8", "0.9");
//! let error = Preset::from_bytes(broken.as_bytes()).unwrap_err();
//! assert!(error.to_string().contains("not orthonormal"));
//! # Ok::<(), kvlathe_preset::PresetError>(())
//! ```

#![forbid(unsafe_code)]

mod atomic_write;
mod error;
mod file;
mod fingerprint;
mod json;
mod preset;
mod rounding;
mod safetensors_file;
mod safetensors_header;
mod validate;
mod wire;

pub use error::PresetError;
pub use fingerprint::fingerprint;
pub use preset::{
    LatheMeta, LayerPreset, Meta, Pairing, Preset, RopeDescription, SharedBasis, Side, SidePreset,
    StreamPreset,
};
pub use validate::{
    BLOCK_LENS, MAX_FILE_BYTES, MAX_HEAD_DIM, MAX_KV_HEADS, MAX_LAYERS, MAX_SINKS, MAX_STREAMS,
    ORTHONORMAL_TOLERANCE, WIDTHS,
};

/// The newest version of the format, that of presets made today; older ones are read, and written as they are.
///
/// Version 2 has widths 1 and 3, and its blocks have drift and shorter gains (`docs/block_format.md`). What a preset of
/// version 1 says of its rate and of what was measured holds for blocks of version 1 only.
pub const FORMAT_VERSION: u32 = 2;
