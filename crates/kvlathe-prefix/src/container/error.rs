//! What may be wrong with a file.

use std::io;
use std::path::PathBuf;

use kvlathe_codec::StreamId;
use thiserror::Error;

use super::layout::VERSION;
use super::part::Part;

/// Why a container cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else than a saved cache.
    #[error("this is no saved cache: {found}; kvlathe's files are written by cache.save()")]
    Foreign {
        /// What it looks like.
        found: &'static str,
    },
    /// A later version of the format.
    #[error(
        "this file has version {given} of the format, and this kvlathe reads versions up to {VERSION}; upgrade kvlathe, or write the file with this one"
    )]
    Newer {
        /// The file's.
        given: u32,
    },
    /// A file of another length than it says.
    #[error(
        "the file has {given} bytes, and {expected} when it was written: it was cut short or copied in part; take a whole copy of it"
    )]
    Length {
        /// Its bytes.
        given: u64,
        /// What it says.
        expected: u64,
    },
    /// A checksum that does not fit.
    #[error(
        "{part} is damaged: its checksum is {given:08x}, and {expected:08x} when it was written; take another copy of the file, or save the cache again"
    )]
    Damaged {
        /// What is damaged.
        part: Part,
        /// Of the bytes there.
        given: u32,
        /// As written.
        expected: u32,
    },
    /// Numbers that do not fit each other, whatever their checksums say.
    #[error("the header says something impossible: {what}")]
    Header {
        /// What.
        what: String,
    },
    /// A piece that lies elsewhere than pieces can.
    #[error(
        "{part} has {given} bytes from byte {offset} on; expected are {expected}, where the piece before it ends or where an equal one is"
    )]
    Piece {
        /// Which.
        part: Part,
        /// Where it is said to begin.
        offset: u64,
        /// Its length, as the table says.
        given: u64,
        /// Its length, as the header says.
        expected: usize,
    },
    /// Contents that are not what the header says, given to [`write`](super::write()).
    #[error("{what} given to be written: {given}, expected {expected}")]
    Contents {
        /// Of what.
        what: String,
        /// Bytes or pieces given.
        given: usize,
        /// As the header has it.
        expected: usize,
    },
    /// A block that does not belong where it was given to be written.
    #[error("a block of {given} was given for {expected}")]
    Block {
        /// Which codec packed it.
        given: StreamId,
        /// Which one packs those that belong there.
        expected: StreamId,
    },
    /// No memory.
    #[error("out of memory for the table of {n_pieces} pieces")]
    OutOfMemory {
        /// Its length.
        n_pieces: usize,
    },
}

/// The result of reading or writing a container.
pub type Result<T> = std::result::Result<T, ContainerError>;
