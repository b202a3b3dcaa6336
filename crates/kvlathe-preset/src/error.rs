//! Everything that can be wrong with a preset, said so that a person can act on it.

use std::io;
use std::path::PathBuf;

use kvlathe_codec::Side;

/// Why a preset could not be read, written or accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PresetError {
    /// The operating system said no.
    #[error("cannot read or write the preset `{}`: {source}", path.display())]
    Io {
        /// The file that was asked for.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// More bytes than any real preset has.
    #[error(
        "this file has {given} bytes and a preset at most {limit}; is it perhaps the model's own weights?"
    )]
    TooLarge {
        /// Size in bytes.
        given: u64,
        /// [`MAX_FILE_BYTES`](crate::MAX_FILE_BYTES).
        limit: u64,
    },

    /// Neither of the two formats.
    #[error(
        "this is not a preset: {found}. A preset is a JSON object or a safetensors file; \
         check the path, or calibrate a new one"
    )]
    NotAPreset {
        /// What the bytes look like.
        found: String,
    },

    /// JSON that cannot be parsed, or has a value of the wrong type.
    #[error("{place}, line {line}, column {column}: {detail}. Was the file cut short or edited by hand?")]
    Json {
        /// Which JSON: the file, or the metadata of a safetensors file.
        place: &'static str,
        /// Line, from 1.
        line: usize,
        /// Column, from 1; 0 when unknown.
        column: usize,
        /// What the parser found.
        detail: String,
    },

    /// A safetensors container that cannot be parsed.
    #[error("broken safetensors file: {detail}. It was probably cut short; copy or download it again")]
    Safetensors {
        /// What the parser found.
        detail: String,
    },

    /// Something that every preset has is not there.
    #[error("the preset has no `{key}`, which is required; calibrate again, or add it")]
    MissingKey {
        /// Full path of the key or tensor, such as `layers[3].K.U`.
        key: String,
    },

    /// An array of the wrong shape.
    #[error(
        "layer {layer}, {side}: `{what}` has shape {given}, expected {expected}; does it belong to another model?"
    )]
    Shape {
        /// Layer, from 0.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// The array, as named in the file.
        what: String,
        /// Its shape.
        given: String,
        /// The shape that the metadata demands.
        expected: String,
    },

    /// NaN, infinity or `null` among the numbers.
    #[error(
        "layer {layer}, {side}: `{what}` holds NaN, infinity or null; the calibration failed there, run it again"
    )]
    NonFinite {
        /// Layer, from 0.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// The array, as named in the file.
        what: String,
    },

    /// Columns of a shared `U` that are not orthonormal.
    #[error(
        "layer {layer}, {side}: the columns of `U` are not orthonormal: UᵀU differs from the identity by \
         {deviation:.2e}, and {tolerance:.0e} is allowed; orthonormalise U (QR) before you save it",
        tolerance = crate::ORTHONORMAL_TOLERANCE
    )]
    NotOrthonormal {
        /// Layer, from 0.
        layer: usize,
        /// Keys or values.
        side: Side,
        /// Largest absolute entry of UᵀU − I.
        deviation: f64,
    },

    /// Written by a newer library.
    #[error(
        "this preset has format version {given} and this library reads up to {supported}; upgrade kvlathe"
    )]
    UnsupportedVersion {
        /// The file's version.
        given: u32,
        /// [`FORMAT_VERSION`](crate::FORMAT_VERSION).
        supported: u32,
    },

    /// A value outside its range.
    #[error("`{what}` is {given}, expected {expected}")]
    Invalid {
        /// The field, as named in the file.
        what: String,
        /// Its value.
        given: String,
        /// What would be accepted.
        expected: String,
    },

    /// The preset was calibrated for another model.
    #[error(
        "this preset was calibrated for `{model}` (fingerprint {expected}…), and this model's config has \
         fingerprint {given}…; use that model, or calibrate a preset for this one"
    )]
    WrongModel {
        /// [`Meta::model`](crate::Meta::model).
        model: String,
        /// First digits of the preset's fingerprint.
        expected: String,
        /// First digits of the config's fingerprint.
        given: String,
    },

    /// A file name from which the format cannot be told.
    #[error("cannot tell the format of `{}`: name it .safetensors (small, the default) or .json", path.display())]
    Extension {
        /// The path that was given.
        path: PathBuf,
    },
}

impl PresetError {
    /// Shorthand for the most common variant.
    pub(crate) fn invalid(
        what: impl Into<String>,
        given: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid { what: what.into(), given: given.to_string(), expected: expected.into() }
    }

    pub(crate) fn missing(key: impl Into<String>) -> Self {
        Self::MissingKey { key: key.into() }
    }

    pub(crate) fn json(place: &'static str, error: &serde_json::Error) -> Self {
        // serde_json repeats the position at the end of its message; ours comes first.
        let text = error.to_string();
        let detail = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]).to_owned();
        Self::Json { place, line: error.line(), column: error.column(), detail }
    }
}
