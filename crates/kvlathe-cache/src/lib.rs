//! A layer's key/value cache that keeps its middle packed.
//!
//! ```text
//! position  0 ............................................................ n_tokens
//!           | sinks |  block  |  block  |  block  |          tail          |
//!             exact     packed, shared by beams and copies      exact
//! ```
//!
//! Tokens enter at the tail and leave it in whole blocks. Cropping removes them at the tail again; beams select rows
//! and share the blocks they have in common. A sliding window forgets its oldest tokens.
//!
//! ```
//! use kvlathe_cache::{Coding, LayerCache, Policy, TensorView};
//!
//! let mut cache = LayerCache::new(Coding::Exact, Coding::Exact, Policy::default(), 1, 2, (4, 4))?;
//! let x: Vec<f32> = (0..2 * 3 * 4).map(|i| i as f32).collect(); // 2 heads, 3 tokens, 4 components
//! let view = TensorView::contiguous(&x, [1, 2, 3, 4])?;
//! cache.append(view, view)?;
//! cache.compress(1)?;
//! let mut keys = vec![0.0; x.len()];
//! cache.read_keys(0..3, &mut keys, 3, 1)?;
//! assert_eq!(keys, x);
//! # Ok::<(), kvlathe_cache::CacheError>(())
//! ```

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod attention;
mod block;
mod coding;
mod error;
mod exact;
mod layer;
mod pieces;
mod side;
mod threads;
mod view;
mod workspace;

pub use attention::AttentionOptions;
pub use coding::Coding;
pub use error::{CacheError, Result};
pub use layer::{LayerCache, MemoryUse, Policy};
pub use threads::{Team, adopt_team, with_threads};
pub use view::TensorView;
