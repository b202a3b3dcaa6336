//! Paths and bytes: which format is it, how is it read, how is it written.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::atomic_write::atomic_write;
use crate::{MAX_FILE_BYTES, Preset, PresetError, json, safetensors_file, wire};

/// Longest header that the safetensors specification allows, in bytes.
const MAX_SAFETENSORS_HEADER: u64 = 100_000_000;

/// What the format is told by, in bytes: longer than any header's beginning.
const SNIFFED_BYTES: u64 = 4096;

/// The two containers of a preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Safetensors,
}

impl Preset {
    /// Reads and validates a preset. The format is told by the content, so the file's name does not matter.
    ///
    /// # Errors
    ///
    /// [`PresetError::Io`] when the file cannot be read, and every other variant for what may be wrong
    /// inside.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, PresetError> {
        let path = path.as_ref();
        let io_error = |source| PresetError::Io { path: path.to_owned(), source };
        // Before it is opened, as opening a pipe waits for somebody to write to it; a device may never end.
        let metadata = fs::metadata(path).map_err(io_error)?;
        if !metadata.is_file() {
            let kind = if metadata.is_dir() { "a folder" } else { "a pipe or a device" };
            return Err(io_error(io::Error::other(format!("it is {kind}, expected a file"))));
        }
        check_size(metadata.len())?;
        let file = File::open(path).map_err(io_error)?;
        // Bounded, since a file can grow after it was measured.
        let mut file = file.take(MAX_FILE_BYTES + 1);
        let mut bytes = Vec::new();
        file.by_ref().take(SNIFFED_BYTES).read_to_end(&mut bytes).map_err(io_error)?;
        // No memory for a large file that is something else.
        sniff(&bytes)?;
        file.read_to_end(&mut bytes).map_err(io_error)?;
        Self::from_bytes(&bytes)
    }

    /// Reads and validates a preset that is in memory already.
    ///
    /// # Errors
    ///
    /// As [`Preset::read`], without the file system.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, PresetError> {
        check_size(bytes.len() as u64)?;
        match sniff(bytes)? {
            Format::Json => json::from_bytes(bytes),
            Format::Safetensors => safetensors_file::from_bytes(bytes),
        }
    }

    /// Validates and writes the preset, as `.safetensors` or `.json` by the extension of `path`. Numbers are
    /// [rounded](Preset::rounded). The file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// [`PresetError::Extension`] for any other extension, what [`Preset::validate`] finds,
    /// [`PresetError::Invalid`] when a number does not fit float16, and [`PresetError::Io`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), PresetError> {
        let path = path.as_ref();
        let bytes = match format_of(path)? {
            Format::Json => self.to_json_string()?.into_bytes(),
            Format::Safetensors => self.to_safetensors_bytes()?,
        };
        check_size(bytes.len() as u64)?;
        atomic_write(path, |file| file.write_all(&bytes))
            .map_err(|source| PresetError::Io { path: path.to_owned(), source })
    }

    /// The JSON file as text.
    ///
    /// # Errors
    ///
    /// As [`Preset::write`], without the file system.
    pub fn to_json_string(&self) -> Result<String, PresetError> {
        json::to_string(&self.checked_for_writing()?)
    }

    /// The safetensors file as bytes.
    ///
    /// # Errors
    ///
    /// As [`Preset::write`], without the file system.
    pub fn to_safetensors_bytes(&self) -> Result<Vec<u8>, PresetError> {
        safetensors_file::to_bytes(&self.checked_for_writing()?)
    }

    /// What a reader will see, or why it would be refused.
    fn checked_for_writing(&self) -> Result<Self, PresetError> {
        self.validate()?;
        wire::check_free(&self.meta)?;
        self.check_float16_range()?;
        let rounded = self.rounded();
        // Once more, because rounding may take a U that is barely orthonormal over the edge.
        rounded.validate()?;
        Ok(rounded)
    }
}

fn check_size(given: u64) -> Result<(), PresetError> {
    if given > MAX_FILE_BYTES {
        return Err(PresetError::TooLarge { given, limit: MAX_FILE_BYTES });
    }
    Ok(())
}

fn format_of(path: &Path) -> Result<Format, PresetError> {
    let extension = path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("json") => Ok(Format::Json),
        Some("safetensors") => Ok(Format::Safetensors),
        _ => Err(PresetError::Extension { path: path.to_owned() }),
    }
}

/// Tells the format by the first bytes.
///
/// A safetensors file may well begin with `{`: its first byte is the low byte of a length. So it is looked
/// for first, by a length that is possible (its upper bytes are NUL, which no JSON text contains) followed by
/// `{`.
fn sniff(bytes: &[u8]) -> Result<Format, PresetError> {
    let header = bytes.split_first_chunk::<8>().filter(|(_, rest)| rest.first() == Some(&b'{'));
    let header_len = header.map(|(length, _)| u64::from_le_bytes(*length));
    if header_len.is_some_and(|length| length <= MAX_SAFETENSORS_HEADER) {
        return Ok(Format::Safetensors);
    }
    match json::skip_bom(bytes).trim_ascii_start().first() {
        Some(b'{') => Ok(Format::Json),
        // An impossible length before a `{`: let the safetensors parser say what is wrong with it.
        _ if header_len.is_some() => Ok(Format::Safetensors),
        _ => Err(PresetError::NotAPreset { found: describe(bytes).to_owned() }),
    }
}

/// What a file that is no preset looks like, for the error message.
fn describe(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "the file is empty",
        [b'P', b'K', ..] => "it is a zip archive, perhaps saved by torch.save, which kvlathe never unpickles",
        [0x80, ..] => "it looks like a Python pickle, which kvlathe never opens",
        [b'G', b'G', b'U', b'F', ..] => "it is a GGUF file, which holds a model",
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] => {
            "it may be a Git LFS pointer; fetch the file itself with `git lfs pull`"
        }
        [b'<', ..] => "it looks like a web page, perhaps in place of a download",
        [b'[', ..] => "it is a JSON array",
        _ => "it starts with neither `{` nor a safetensors header",
    }
}
