//! What may be wrong with a store.

use std::time::Duration;

use thiserror::Error;

use crate::container::ContainerError;

/// Why a store cannot be opened, read or written. No message holds credentials.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A URL that names no store.
    #[error("{url}: {what}")]
    Url {
        /// As given, without credentials.
        url: String,
        /// What is wrong, and what is expected.
        what: String,
    },
    /// What the store or the way there says.
    #[error("the prefix store {url} {verb} {name}: {source}")]
    Backend {
        /// Which store, without credentials.
        url: String,
        /// What was tried, as "cannot read".
        verb: &'static str,
        /// Of the object.
        name: String,
        /// What was said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Too slow.
    #[error("the prefix store {url} did not answer within {} s; give it more time (timeout_s), or see whether it runs", limit.as_secs_f64())]
    Timeout {
        /// Which store.
        url: String,
        /// The time that was given.
        limit: Duration,
    },
    /// An object that is no undamaged container.
    #[error("{name} in the prefix store: {source}")]
    Damaged {
        /// Of the object.
        name: String,
        /// What is wrong with it.
        source: ContainerError,
    },
    /// A container that is not what its name says.
    #[error(
        "{name} in the prefix store is not the chunk of this name: {what}; it was changed or renamed, delete it"
    )]
    Mismatch {
        /// Of the object.
        name: String,
        /// What differs.
        what: &'static str,
    },
    /// Contents that cannot be written.
    #[error("{0}")]
    Contents(#[from] ContainerError),
    /// Something that this kind of store does not do.
    #[error("{url}: {what}")]
    Unsupported {
        /// Which store.
        url: String,
        /// What, and what to do.
        what: String,
    },
    /// The system gave no thread.
    #[error("no threads for the prefix store: {0}")]
    Threads(std::io::Error),
}

/// The result of asking a store.
pub type Result<T> = std::result::Result<T, StoreError>;
