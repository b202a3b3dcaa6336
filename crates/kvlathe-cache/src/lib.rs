//! One layer's key/value cache: a few tokens exact, the others packed, attention over all of them.
//!
//! ```text
//! position  0 ............................................................ n_tokens
//!           | sinks |  block  |  block  |  block  |          tail          |
//!             exact     packed, shared by beams and copies      exact
//! ```
//!
//! A [`LayerCache`] holds the keys and values of one layer for a batch of sequences. It knows a codec for each side (a
//! [`Coding`]) and a [`Policy`]: how many of the first and of the latest tokens stay exact, and how far a sliding window
//! reaches. It knows nothing of models, presets or Python.
//!
//! # What goes in and out
//!
//! * **[`append`](LayerCache::append)** takes new tokens, as a model hands them over ([`TensorView`]; [`Tensor`] for who
//!   has no tensors). They enter at the tail.
//! * **[`settle`](LayerCache::settle)** packs what has left the tail, whole blocks at a time, and drops what no later query
//!   sees. Block *n* holds the positions *n*·B to *n*·B + B − 1, whatever is exact: it is the same in every cache.
//! * **[`attend`](LayerCache::attend)** answers queries from sinks, packed blocks and tail in one softmax, and gives its
//!   log-sum-exp, with which answers over different tokens can be joined.
//! * **[`read`](LayerCache::read)** expands tokens, **[`crop`](LayerCache::crop)** removes the newest,
//!   **[`select`](LayerCache::select)** reorders, repeats and drops rows, as beam search does.
//! * **[`export`](LayerCache::export)** gives [`Block`]s by name, without copying. **[`import`](LayerCache::import)**
//!   attends to them where they lie, in memory or in a mapped file.
//!
//! What is refused leaves the layer as it was, a lack of memory too. Rows and copies share blocks; nothing changes a block
//! once it is made.
//!
//! ```
//! use std::sync::Arc;
//!
//! use kvlathe_cache::{AttentionOptions, Coding, LayerCache, Policy, Tensor};
//! use kvlathe_codec::{Basis, StreamSet, Width};
//!
//! // Two KV heads of 8 components, 4 bits each, in blocks of 16 tokens. Presets give better codecs.
//! let set = StreamSet::new(&[(); 2].map(|()| Basis::uncalibrated(8, Width::W4)), None, 16)?;
//! let coding = Coding::Blocks(Arc::new(set));
//! let policy = Policy { n_sinks: 4, n_tail: 8, ..Policy::default() };
//! let mut layer = LayerCache::new(coding.clone(), coding, policy, 1, 2, (8, 8))?;
//!
//! let mut wave = (0..).map(|i| (i as f32).sin());
//! let mut tensor = |n_heads, n| Tensor::from_fn([1, n_heads, n, 8], || wave.next().unwrap_or(0.0));
//! let (keys, values, query) = (tensor(2, 100), tensor(2, 100), tensor(2, 1));
//! layer.append(keys.view(), values.view())?;
//! layer.settle(1)?;
//! assert_eq!((layer.n_tokens(), layer.n_coded()), (100, 76)); // 4 sinks, 5 blocks but for them, a tail of 20
//!
//! let mut answer = [0.0f32; 2 * 8];
//! layer.attend(query.view(), AttentionOptions::default(), &mut answer, None, 1)?;
//! # assert!(answer.iter().all(|v| v.abs() <= 1.1));
//! # Ok::<(), kvlathe_cache::CacheError>(())
//! ```
//!
//! # Threads
//!
//! Calls take as many threads as they are told. They are those of a [`Team`] that somebody lends ([`adopt_team`]), torch's
//! for example, else a pool of the library's own, and never rayon's global one.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod attention;
mod block;
mod coding;
mod error;
mod exact;
mod export;
mod layer;
mod policy;
mod side;
mod threads;
mod view;
mod workspace;

pub use attention::AttentionOptions;
pub use bytes::Bytes;
pub use coding::Coding;
pub use error::{BlockMismatch, CacheError, Result};
pub use export::{Block, ExportedSide, Positions, SideParts};
pub use kvlathe_codec::Side;
pub use layer::{LayerCache, MemoryUse};
pub use policy::Policy;
pub use threads::{Team, adopt_team, with_threads};
pub use view::{Tensor, TensorView};
