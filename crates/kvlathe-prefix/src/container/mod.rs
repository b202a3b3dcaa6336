//! One file, one conversation: a cache's exact tokens and packed blocks, as `docs/container_format.md` specifies them.
//!
//! ```text
//! | prelude | header, JSON | table of pieces | token ids | layer 0: sinks, tail, blocks of keys, of values | layer 1 …
//!   64 bytes                                    each piece begins at a multiple of 64
//! ```
//!
//! A [`Container`] is opened once and checked as a whole: lengths before they are used, then the checksum of every piece.
//! After that nothing is copied: blocks are [`Block`](kvlathe_cache::Block)s whose bytes lie in the mapped file, for
//! [`LayerCache::import`](kvlathe_cache::LayerCache::import), and processes that open the same file share its pages.
//! [`write`](fn@write) replaces a file as a whole or leaves it as it was.

mod error;
mod header;
mod layout;
mod part;
mod reader;
mod writer;

pub use error::{ContainerError, Result};
pub use header::{Dtype, Header, LayerHeader, SideHeader};
pub use layout::{MAGIC, VERSION};
pub use part::{Part, Place};
pub use reader::Container;
pub(crate) use reader::mapped;
pub use writer::{Contents, SideContents, to_bytes, write};
