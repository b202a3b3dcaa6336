//! Preset files: what calibration learnt about a model, on disk.
//!
//! A [`Preset`] holds, for every layer of a model and for its keys (K) and values (V) apart, the numbers that the codec
//! needs: means, bases, and how many bits each coefficient gets. It says which model it is for, by a [`fingerprint`] of the
//! model's config, and what was measured of it. This crate is data, files and checks. Sides, rotations and the numbers
//! that are possible are those of [`kvlathe_codec`]; nothing is coded here, and there are no tensors or models, so a preset
//! can be inspected, converted and verified anywhere.
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
//!
//! # Two generations, two containers
//!
//! | | seed preset | kvlathe preset |
//! |---|---|---|
//! | [`Meta::lathe`] | `None` | `Some` |
//! | per layer and side | one basis `U` shared by the heads, flat int8 | the same `U`, plus one [`StreamPreset`] per KV head |
//! | files | JSON (or safetensors) | safetensors (or JSON) |
//!
//! Every kvlathe preset is also a complete seed preset, so older readers can use it. `docs/preset_format.md` specifies both
//! files to the byte.
//!
//! # The digest
//!
//! Packed blocks mean nothing without the preset that packed them. [`Preset::digest`] is a SHA-256 of all that they depend
//! on (streams, widths, rotations, the length of a block, the block format) and of nothing else: it does not change with
//! what was measured, or from one container to the other. Blocks carry it as a part of their name.
//!
//! # What a reader may rely on
//!
//! * [`Preset::read`] returns only presets that pass [`Preset::validate`]: shapes fit, every number is finite, `U` is
//!   orthonormal, every width is one the codec has.
//! * A hostile file yields a [`PresetError`], never a panic, and a size claimed by a file is believed only after the bytes
//!   behind it were seen. Nothing here executes what it reads.
//! * Large arrays are stored as float16. [`Preset::rounded`] returns what a reader will see; the relative error of each
//!   number is at most 2⁻¹¹ (absolute 2⁻²⁵ below 2⁻¹⁴). Both formats give bit-identical presets.
//! * [`Preset::write`] replaces a file as a whole or leaves it as it was.

#![forbid(unsafe_code)]

mod atomic_write;
mod digest;
mod error;
mod file;
mod fingerprint;
mod json;
mod limited_wire;
mod preset;
mod rounding;
mod safetensors_file;
mod safetensors_header;
mod validate;
mod wire;

pub use atomic_write::atomic_write;
pub use error::PresetError;
pub use fingerprint::{cache_fingerprint, fingerprint};
pub use kvlathe_codec::{BLOCK_LENS, Digest, LayerShape, MAX_HEAD_DIM, Pairing, Rope, Side, WIDTHS, Width};
pub use preset::{LatheMeta, LayerPreset, Meta, Preset, SharedBasis, SidePreset, StreamPreset};
pub use validate::{MAX_FILE_BYTES, MAX_KV_HEADS, MAX_LAYERS, MAX_SINKS, MAX_STREAMS, ORTHONORMAL_TOLERANCE};

/// The newest version of the format; older ones are read, and written as they are.
///
/// Version 2 has widths 1 and 3, and its blocks have drift and shorter gains (`docs/block_format.md`). What a preset of
/// version 1 says of its rate and of what was measured holds for blocks of version 1 only. Version 3 has the arrays, rates
/// and codes of version 2; its blocks begin elsewhere, see [`BLOCK_FORMAT`].
///
/// Version 4 has [`LatheMeta::layer_shapes`]: layers that are not coded, and layers of different sizes. A preset that needs
/// neither is written as [`UNIFORM_VERSION`].
pub const FORMAT_VERSION: u32 = 4;

/// The version of presets whose layers are all coded and alike.
pub const UNIFORM_VERSION: u32 = 3;

/// The version of the packed blocks that presets describe today, whatever the version of their file. It is a part of the
/// [digest](Preset::digest).
///
/// Version 3: blocks begin at multiples of `block_len`, and sinks are coded as zero vectors in block 0.
pub const BLOCK_FORMAT: u32 = 3;
