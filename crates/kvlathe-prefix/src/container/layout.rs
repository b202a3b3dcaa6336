//! Prelude and table of pieces, to the byte.

use super::error::{ContainerError, Result};
use super::part::Part;

/// The first eight bytes. A byte that is no ASCII and both kinds of line ends show copies that were made as text.
pub const MAGIC: [u8; 8] = *b"\x89KVL\r\n\x1a\n";

/// Of the format; a change that an older reader would misread raises it.
pub const VERSION: u32 = 1;

/// Pieces begin at multiples of it: a cache line.
pub(super) const ALIGNMENT: usize = 64;

/// Bytes of the prelude.
pub(super) const PRELUDE_BYTES: usize = 64;

/// Bytes of an entry of the table.
pub(super) const ENTRY_BYTES: usize = 24;

/// Longest header, JSON alone.
pub(super) const MAX_JSON_BYTES: u64 = 1 << 26;

/// The next multiple of [`ALIGNMENT`].
pub(super) fn aligned(n: usize) -> Option<usize> {
    n.checked_next_multiple_of(ALIGNMENT)
}

/// What comes first.
pub(super) struct Prelude {
    /// Of header and table with what fills them up.
    pub(super) header_crc: u32,
    pub(super) file_bytes: u64,
    pub(super) json_bytes: u64,
    pub(super) n_pieces: u64,
}

impl Prelude {
    pub(super) fn to_bytes(&self) -> [u8; PRELUDE_BYTES] {
        let mut bytes = [0; PRELUDE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.header_crc.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.file_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.json_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.n_pieces.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Of a file's first bytes: is it one of ours, of a version that is known, and undamaged?
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC[..bytes.len().clamp(1, 8)]) {
            return Err(ContainerError::Foreign { found: describe(bytes) });
        }
        if bytes.len() < PRELUDE_BYTES {
            let (given, expected) = (bytes.len() as u64, PRELUDE_BYTES as u64);
            return Err(ContainerError::Length { given, expected });
        }
        let version = u32_at(bytes, 8);
        let (crc, expected) = (crc32fast::hash(&bytes[..60]), u32_at(bytes, 60));
        if version > VERSION {
            return Err(ContainerError::Newer { given: version });
        }
        if crc != expected || version == 0 {
            return Err(ContainerError::Damaged { part: Part::Prelude, given: crc, expected });
        }
        Ok(Self {
            header_crc: u32_at(bytes, 12),
            file_bytes: u64_at(bytes, 16),
            json_bytes: u64_at(bytes, 24),
            n_pieces: u64_at(bytes, 32),
        })
    }
}

/// An entry of the table.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) offset: u64,
    pub(super) n_bytes: u64,
    /// Of the piece and the zeros that fill it up to a multiple of [`ALIGNMENT`].
    pub(super) crc: u32,
}

impl Entry {
    pub(super) fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.n_bytes.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self { offset: u64_at(bytes, 0), n_bytes: u64_at(bytes, 8), crc: u32_at(bytes, 16) }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// What a file that is none of ours looks like.
fn describe(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "the file is empty",
        [b'P', b'K', ..] => "it is a zip archive, perhaps of torch.save, which torch.load reads",
        [0x80, ..] => "it looks like a Python pickle, which kvlathe never opens by itself",
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] => "it may be a Git LFS pointer",
        [b'<', ..] => "it looks like a web page, perhaps in place of a download",
        [_, _, _, _, _, _, _, _, b'{', ..] => "it looks like a safetensors file, such as a preset",
        [b'{', ..] => "it looks like JSON",
        _ => "it begins with other bytes",
    }
}
