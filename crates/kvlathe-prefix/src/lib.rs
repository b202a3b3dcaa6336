//! Compressed key/value caches that outlive their process.
//!
//! | module | holds |
//! |---|---|
//! | [`container`] | one conversation as one file, `docs/container_format.md`; attention reads its blocks where it is mapped |
//!
//! Nothing here is unpickled or run, and every length is checked before it is used.

#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod container;
