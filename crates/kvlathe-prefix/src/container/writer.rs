//! Writing a container, whole or not at all.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use kvlathe_cache::{Block, Bytes};
use kvlathe_codec::{Side, StreamId};
use kvlathe_preset::atomic_write;

use super::error::{ContainerError, Result};
use super::header::{Header, LayerHeader};
use super::layout::{ALIGNMENT, ENTRY_BYTES, Entry, PRELUDE_BYTES, Prelude, aligned};
use super::part::{Place, pieces};

/// What goes into a file, for [`write`](fn@write). Exact tokens are `[batch, heads, n, head_dim]`, contiguous and little-endian.
#[derive(Debug, Clone)]
pub struct Contents<'a> {
    /// Sizes of all that follows.
    pub header: Header,
    /// `[batch, n_tokens - first_token_id]`, row by row.
    pub token_ids: Option<&'a [u32]>,
    /// Keys and values of each layer that the header has a shape for.
    pub layers: Vec<[SideContents<'a>; 2]>,
}

/// Keys or values of a layer.
#[derive(Debug, Clone)]
pub struct SideContents<'a> {
    /// Exact first tokens.
    pub sinks: &'a [u8],
    /// Of each row, oldest first.
    pub blocks: Vec<Vec<Block>>,
    /// Exact last tokens.
    pub tail: &'a [u8],
}

/// A piece that is written, or the number of one that has the same memory.
enum Piece<'a> {
    New(&'a [u8]),
    Shared(usize),
}

/// Writes a file beside `path` and renames it: whoever reads `path` finds the old file or the new one. Blocks that rows
/// share are written once.
///
/// # Errors
/// Contents that do not fit their header, and what the system says. `path` is as it was then.
pub fn write(path: impl AsRef<Path>, contents: &Contents<'_>) -> Result<()> {
    let path = path.as_ref();
    let ids = id_bytes(contents);
    let planned = Planned::new(contents, ids.as_deref())?;
    let written = atomic_write(path, |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        planned.write(&mut file)?;
        file.flush()
    });
    written.map_err(|source| ContainerError::Io { path: path.to_owned(), source })
}

/// The bytes of the file that [`write()`] makes.
///
/// # Errors
/// Contents that do not fit their header, and no memory.
pub fn to_bytes(contents: &Contents<'_>) -> Result<Bytes> {
    let ids = id_bytes(contents);
    let planned = Planned::new(contents, ids.as_deref())?;
    let mut file = Vec::new();
    let n_pieces = contents.header.n_pieces().unwrap_or(0);
    file.try_reserve_exact(planned.n_bytes).map_err(|_| ContainerError::OutOfMemory { n_pieces })?;
    planned.write(&mut file).map_err(|source| ContainerError::Io { path: PathBuf::new(), source })?;
    Ok(file.into())
}

fn id_bytes(contents: &Contents<'_>) -> Option<Vec<u8>> {
    contents.token_ids.map(|ids| ids.iter().flat_map(|id| id.to_le_bytes()).collect())
}

/// A file whose every byte has its place.
struct Planned<'a> {
    prelude: Prelude,
    /// Header and table.
    described: Vec<u8>,
    pieces: Vec<Piece<'a>>,
    n_bytes: usize,
}

impl<'a> Planned<'a> {
    fn new(contents: &'a Contents<'_>, ids: Option<&'a [u8]>) -> Result<Self> {
        contents.header.check()?;
        let given = given_pieces(contents, ids)?;
        let json = contents.header.to_json()?;
        let header_end = PRELUDE_BYTES + json.len() + ENTRY_BYTES * given.len();
        let too_large = || ContainerError::Header { what: "more bytes than there can be".to_owned() };
        let mut offset = aligned(header_end).ok_or_else(too_large)?;
        let mut entries: Vec<Entry> = Vec::with_capacity(given.len());
        for piece in &given {
            entries.push(match *piece {
                Piece::New(bytes) => {
                    let entry =
                        Entry { offset: offset as u64, n_bytes: bytes.len() as u64, crc: padded_crc(bytes) };
                    offset =
                        aligned(bytes.len()).and_then(|n| offset.checked_add(n)).ok_or_else(too_large)?;
                    entry
                }
                Piece::Shared(with) => entries[with],
            });
        }
        let mut described = json;
        let json_bytes = described.len() as u64;
        described.extend(entries.iter().flat_map(|entry| entry.to_bytes()));
        described.resize(described.len().next_multiple_of(ALIGNMENT), 0);
        let prelude = Prelude {
            header_crc: crc32fast::hash(&described),
            file_bytes: offset as u64,
            json_bytes,
            n_pieces: entries.len() as u64,
        };
        Ok(Self { prelude, described, pieces: given, n_bytes: offset })
    }

    fn write(&self, file: &mut impl Write) -> io::Result<()> {
        file.write_all(&self.prelude.to_bytes())?;
        file.write_all(&self.described)?;
        for piece in &self.pieces {
            if let Piece::New(bytes) = piece {
                write_padded(file, bytes)?;
            }
        }
        Ok(())
    }
}

/// Behind a piece of so many bytes.
fn padding(n_bytes: usize) -> &'static [u8] {
    &[0; ALIGNMENT][..n_bytes.next_multiple_of(ALIGNMENT) - n_bytes]
}

fn padded_crc(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytes);
    crc.update(padding(bytes.len()));
    crc.finalize()
}

fn write_padded(file: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.write_all(padding(bytes.len()))
}

/// All pieces in the order of the table, if they are what the header says.
fn given_pieces<'a>(contents: &'a Contents<'_>, ids: Option<&'a [u8]>) -> Result<Vec<Piece<'a>>> {
    let header = &contents.header;
    let layers: Vec<(usize, &LayerHeader)> =
        header.layers.iter().enumerate().filter_map(|(at, layer)| Some((at, layer.as_ref()?))).collect();
    expect(|| "layers".into(), contents.layers.len(), layers.len())?;
    expect(|| "token ids".into(), usize::from(ids.is_some()), usize::from(header.has_token_ids))?;
    let mut given: Vec<Piece<'a>> = ids.map(Piece::New).into_iter().collect();
    let mut known: HashMap<(*const u8, usize), usize> = HashMap::new();
    for ((layer, shape), sides) in layers.into_iter().zip(&contents.layers) {
        for (side, of_side) in Side::ALL.into_iter().zip(sides) {
            let place = Place { layer, side };
            given.extend([of_side.sinks, of_side.tail].map(Piece::New));
            expect(|| format!("rows of {place}"), of_side.blocks.len(), header.batch)?;
            for row in &of_side.blocks {
                expect(|| format!("blocks of a row of {place}"), row.len(), shape.side(side).n_blocks)?;
                for (index, block) in row.iter().enumerate() {
                    check_block(header, shape, place, index, block)?;
                    given.push(piece_of(&block.bytes, given.len(), &mut known));
                }
            }
        }
    }
    for (piece, (part, n_bytes)) in given.iter().zip(pieces(header)) {
        if let Piece::New(bytes) = piece {
            expect(|| part.to_string(), bytes.len(), n_bytes)?;
        }
    }
    Ok(given)
}

/// The bytes of the piece number `at`, or the number of an earlier one with the same memory.
fn piece_of<'a>(bytes: &'a Bytes, at: usize, known: &mut HashMap<(*const u8, usize), usize>) -> Piece<'a> {
    match *known.entry((bytes.as_ptr(), bytes.len())).or_insert(at) {
        first if first == at => Piece::New(bytes),
        first => Piece::Shared(first),
    }
}

fn check_block(
    header: &Header,
    shape: &LayerHeader,
    place: Place,
    index: usize,
    block: &Block,
) -> Result<()> {
    let side = shape.side(place.side);
    let id = StreamId { digest: header.preset, layer: place.layer, side: place.side };
    if block.id != id {
        return Err(ContainerError::Block { given: block.id, expected: id });
    }
    let position = side.blocks_at(header.block_len) + index * header.block_len;
    expect(|| format!("the position of block {index} of {place}"), block.first_position, position)?;
    expect(|| format!("bytes of a block of {place}"), block.bytes.len(), side.block_bytes)
}

fn expect(what: impl FnOnce() -> String, given: usize, expected: usize) -> Result<()> {
    if given == expected { Ok(()) } else { Err(ContainerError::Contents { what: what(), given, expected }) }
}
