//! Compressed key/value caches that outlive their process.
//!
//! | module | holds |
//! |---|---|
//! | [`container`] | a cache, or a part of one, as one file, `docs/container_format.md`; attention reads its blocks where it is mapped |
//! | [`scope`] | what a prefix depends on beside its tokens, and the keys of its chunks |
//! | [`chunk`] | a chunk of a prefix: its name, and whether what lies there is it |
//! | [`page`] | tokens of all layers as a server moves them, coded as containers |
//! | [`backend`] | where chunks are kept: a folder, memory, object stores, Redis |
//! | [`store`] | the longest stored prefix of a sequence; [`blocking`] is its door without `async` |
//!
//! Nothing here is unpickled or run, and every length is checked before it is used.

#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod backend;
pub mod blocking;
pub mod chunk;
pub mod container;
pub mod error;
pub mod page;
pub mod scope;
pub mod store;

pub use chunk::{Chunk, ChunkName, Part};
pub use error::StoreError;
pub use page::{PageError, PageStore};
pub use scope::{ChunkKey, Dependencies, Scope};
pub use store::PrefixStore;
