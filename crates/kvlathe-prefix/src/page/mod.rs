//! A server's page: consecutive tokens of all layers that a server moves together. Coded, it is a container of its own.
//!
//! What a page holds, only its server knows: the key that it gives to it names its tokens *and all before them*, and its
//! position comes with it.
//!
//! | module | holds |
//! |---|---|
//! | [`memory`] | where the numbers of a page lie in the server's memory |
//! | [`codec`] | pages as containers, and back |
//! | [`store`] | pages in a [store](crate::PrefixStore), many at once |

pub mod codec;
pub mod memory;
pub mod store;

use kvlathe_cache::CacheError;
use thiserror::Error;

use crate::container::ContainerError;
use crate::error::StoreError;

pub use codec::{PageCodec, PageOrigin};
pub use memory::{PageMemory, PageSizes};
pub use store::{PageName, PageStore, Saved};

/// Why a page cannot be coded, kept or read.
#[derive(Debug, Error)]
pub enum PageError {
    /// Numbers that the codec does not take, and pages of other sizes.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A container that is none of a page.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The result of coding, keeping or reading a page.
pub type Result<T> = std::result::Result<T, PageError>;
