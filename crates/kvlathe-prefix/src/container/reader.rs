//! Opening a container, and what is in it.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use kvlathe_cache::{Block, Bytes};
use kvlathe_codec::{Side, StreamId};
use memmap2::Mmap;

use super::error::{ContainerError, Result};
use super::header::Header;
use super::layout::{ENTRY_BYTES, Entry, MAX_JSON_BYTES, PRELUDE_BYTES, Prelude, aligned};
use super::part::{Part, Place, pieces};

/// A file that has been checked as a whole.
#[derive(Debug, Clone)]
pub struct Container {
    header: Header,
    file: Bytes,
    /// First byte of each piece.
    offsets: Vec<usize>,
    /// Of each layer's keys and values: the number of its first piece.
    first_pieces: Vec<[usize; 2]>,
}

impl Container {
    /// Maps a file and checks all of it. Nobody may write to the file while anything of it is used; to replace it by
    /// renaming, as [`write`](super::write()) does, is fine.
    ///
    /// # Errors
    /// A file that cannot be read, or is no whole and undamaged container of a known version: see [`ContainerError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io_error = |source| ContainerError::Io { path: path.to_owned(), source };
        // Before it is opened, as opening a pipe waits for somebody to write to it.
        if !fs::metadata(path).map_err(io_error)?.is_file() {
            return Err(io_error(io::Error::other("it is no ordinary file")));
        }
        let file = File::open(path).map_err(io_error)?;
        Self::from_bytes(mapped(&file).map_err(io_error)?)
    }

    /// As [`Container::open`], of a file's bytes.
    ///
    /// # Errors
    /// As [`Container::open`].
    pub fn from_bytes(file: Bytes) -> Result<Self> {
        let prelude = Prelude::from_bytes(&file)?;
        if prelude.file_bytes != file.len() as u64 {
            let (given, expected) = (file.len() as u64, prelude.file_bytes);
            return Err(ContainerError::Length { given, expected });
        }
        let (json_bytes, table_bytes) =
            (prelude.json_bytes, prelude.n_pieces.checked_mul(ENTRY_BYTES as u64));
        let described = table_bytes.and_then(|table| json_bytes.checked_add(table)).map(usize::try_from);
        let end = described.and_then(|n| aligned(PRELUDE_BYTES.checked_add(n.ok()?)?));
        let Some(end) = end.filter(|&end| end <= file.len() && json_bytes <= MAX_JSON_BYTES) else {
            let what = format!("{json_bytes} bytes of text and {} pieces", prelude.n_pieces);
            return Err(ContainerError::Header { what });
        };
        check(Part::Header, &file[PRELUDE_BYTES..end], prelude.header_crc)?;
        // Below the file's length.
        let (json, table) = file[PRELUDE_BYTES..end].split_at(json_bytes as usize);
        let header = Header::from_json(json)?;
        let n_pieces = prelude.n_pieces as usize;
        if header.n_pieces() != Some(n_pieces) {
            let what = format!("{n_pieces} pieces, and sizes that make {:?}", header.n_pieces());
            return Err(ContainerError::Header { what });
        }
        let out_of_memory = |_| ContainerError::OutOfMemory { n_pieces };
        let mut offsets = Vec::new();
        offsets.try_reserve_exact(n_pieces).map_err(out_of_memory)?;
        let mut written = Written { entries: Vec::new(), end };
        written.entries.try_reserve_exact(n_pieces).map_err(out_of_memory)?;
        let (entries, _) = table.as_chunks::<ENTRY_BYTES>();
        for ((part, n_bytes), entry) in pieces(&header).zip(entries) {
            let entry = Entry::from_bytes(entry);
            written.take(&file, part, entry, n_bytes)?;
            offsets.push(entry.offset as usize);
        }
        if written.end != file.len() {
            let what = format!("pieces that end at byte {} of {}", written.end, file.len());
            return Err(ContainerError::Header { what });
        }
        let first_pieces = first_pieces(&header);
        Ok(Self { header, file, offsets, first_pieces })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.file.len()
    }

    /// The tokens' ids, row by row, if they were given.
    #[must_use]
    pub fn token_ids(&self) -> Option<Vec<u32>> {
        if !self.header.has_token_ids {
            return None;
        }
        let bytes = self.bytes(0, self.header.token_id_bytes());
        let (ids, _) = bytes.as_chunks::<4>();
        Some(ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
    }

    /// The exact first tokens of a side, `[batch, heads, n, head_dim]`, little-endian; none of a layer that holds nothing.
    #[must_use]
    pub fn sinks(&self, place: Place) -> Bytes {
        self.exact(place, 0)
    }

    /// The exact last tokens of a side, `[batch, heads, n, head_dim]`, little-endian; none of a layer that holds nothing.
    #[must_use]
    pub fn tail(&self, place: Place) -> Bytes {
        self.exact(place, 1)
    }

    fn exact(&self, place: Place, at: usize) -> Bytes {
        let Some(layer) = self.layer(place) else { return Bytes::new() };
        let shape = layer.side(place.side);
        let n_tokens = [shape.n_sinks, shape.n_tail][at];
        let n_bytes = layer.exact_bytes(place.side, self.header.batch, n_tokens);
        self.bytes(self.first_piece(place) + at, n_bytes)
    }

    /// The packed blocks of a side's row, oldest first; none of a layer or row that is not there.
    #[must_use]
    pub fn blocks(&self, place: Place, row: usize) -> Vec<Block> {
        let Some(layer) = self.layer(place).filter(|_| row < self.header.batch) else { return Vec::new() };
        let (shape, block_len) = (layer.side(place.side), self.header.block_len);
        let id = StreamId { digest: self.header.preset, layer: place.layer, side: place.side };
        let first_piece = self.first_piece(place) + 2 + row * shape.n_blocks;
        let block = |index| Block {
            id,
            first_position: shape.blocks_at(block_len) + index * block_len,
            bytes: self.bytes(first_piece + index, shape.block_bytes),
        };
        (0..shape.n_blocks).map(block).collect()
    }

    fn layer(&self, place: Place) -> Option<&super::LayerHeader> {
        self.header.layers.get(place.layer)?.as_ref()
    }

    fn first_piece(&self, place: Place) -> usize {
        self.first_pieces[place.layer][usize::from(place.side == Side::Value)]
    }

    /// A piece, where it lies in the file.
    fn bytes(&self, piece: usize, n_bytes: usize) -> Bytes {
        let offset = self.offsets[piece];
        self.file.slice(offset..offset + n_bytes)
    }
}

/// A file as memory.
#[expect(unsafe_code, reason = "mapping is")]
pub(crate) fn mapped(file: &File) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is only read. That nobody changes the file meanwhile is the caller's promise, which
    // `Container::open` documents; our own writers replace files and never write to one that exists.
    Ok(Bytes::from_owner(unsafe { Mmap::map(file) }?))
}

/// The pieces so far that do not share their bytes with an earlier one: each begins where the one before it ends.
struct Written {
    entries: Vec<Entry>,
    end: usize,
}

impl Written {
    /// The next piece of the table: it follows, or it is an earlier one once more. So no byte is looked at twice,
    /// whatever a table says, and none is left out.
    fn take(&mut self, file: &[u8], part: Part, entry: Entry, expected: usize) -> Result<()> {
        let Entry { offset, n_bytes, crc } = entry;
        let misplaced = || ContainerError::Piece { part, offset, given: n_bytes, expected };
        if n_bytes != expected as u64 {
            return Err(misplaced());
        }
        if offset != self.end as u64 {
            let earlier = self.entries.binary_search_by_key(&offset, |entry| entry.offset);
            let earlier = self.entries[earlier.map_err(|_| misplaced())?];
            return if earlier.n_bytes == n_bytes && earlier.crc == crc { Ok(()) } else { Err(misplaced()) };
        }
        let end = aligned(expected).and_then(|n| self.end.checked_add(n)).ok_or_else(misplaced)?;
        let piece = file.get(self.end..end).ok_or_else(misplaced)?;
        check(part, piece, crc)?;
        if expected > 0 {
            self.entries.push(entry);
        }
        self.end = end;
        Ok(())
    }
}

fn check(part: Part, bytes: &[u8], expected: u32) -> Result<()> {
    let given = crc32fast::hash(bytes);
    if given == expected { Ok(()) } else { Err(ContainerError::Damaged { part, given, expected }) }
}

fn first_pieces(header: &Header) -> Vec<[usize; 2]> {
    let mut next = usize::from(header.has_token_ids);
    let of_layer = |layer: &Option<super::LayerHeader>| {
        Side::ALL.map(|side| {
            let first = next;
            next += layer.as_ref().map_or(0, |layer| 2 + header.batch * layer.side(side).n_blocks);
            first
        })
    };
    header.layers.iter().map(of_layer).collect()
}
