//! The codec: a block of keys or values as bytes, and attention over these bytes.
//!
//! A *stream* is the keys or the values of one layer and KV head of a transformer. Its vectors are far from random: they
//! have a mean, their components move together, and a model reacts to an error in some directions more than in others.
//! Calibration has put that into a [`Basis`]; this crate does the rest, and knows nothing of models, files or caches.
//!
//! # What happens to a vector
//!
//! `block_len` consecutive tokens are packed together. Each is divided by its own size, turned into coefficients that are
//! worth different numbers of bits, and rounded:
//!
//! ```text
//! x ── R(−c) ──▶ block frame ── ÷ γ̂ ──▶ shape ── − R(δ)μ, V⁻¹ ──▶ z ── − drift ── guard, round ──▶ codes
//! ```
//!
//! | step | why |
//! |---|---|
//! | frame | all keys of a block share one rotation: most of the order that RoPE hides comes back |
//! | [gain] γ̂ | the error of a token is in proportion to its own size |
//! | mean μ, transform V | the rest is uncorrelated, and ordered by what it is worth to the model |
//! | drift | what a block's tokens have in common beside the mean is stored once, not left to every token's codes |
//! | guard | a token with an outlier takes larger steps instead of clipping |
//!
//! The codes of one coefficient lie together, a *plane* for each, so that a reader streams through whole planes. A query
//! meets them there: it is turned and projected once a block, and then only integers are multiplied.
//!
//! # The types
//!
//! [`Basis`] and [`Rope`] are parameters, [`StreamTables`] what is computed from them once, for one head; a [`StreamSet`]
//! is all heads of a layer's side, with the name ([`StreamId`]) that its blocks go by. [`Queries`] are queries made ready
//! for a stream, [`CoefficientSums`] weighted sums of values that wait to be turned back. A [`Scratch`] keeps the memory
//! of one call for the next.
//!
//! ```
//! use kvlathe_codec::{Basis, Scratch, StreamTables, Tokens, Width, best_isa};
//!
//! let (head_dim, block_len) = (16, 32);
//! let tables = StreamTables::new(&Basis::uncalibrated(head_dim, Width::W4), None, block_len)?;
//! let x: Vec<f32> = (0..block_len * head_dim).map(|i| (i as f32).sin()).collect();
//!
//! let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
//! let tokens = Tokens { data: &x, token_stride: head_dim };
//! tables.encode_block(best_isa(), tokens, None, &mut packed, &mut scratch)?;
//! assert!(packed.len() < x.len() * 4 / 5); // of float32
//!
//! let mut decoded = vec![0.0f32; x.len()];
//! tables.decode_block(best_isa(), &packed, None, &mut decoded, &mut scratch)?;
//! assert!(x.iter().zip(&decoded).all(|(x, decoded)| (x - decoded).abs() < 0.15));
//! # Ok::<(), kvlathe_codec::CodecError>(())
//! ```
//!
//! # One format, many kernels
//!
//! `docs/block_format.md` specifies the bytes, and the module [`reference`](mod@reference) is the same in Rust, slow and
//! plain. Kernels are written once over what an [instruction set](Isa) can do, and compiled for each; the best one is
//! chosen at run time. Tests hold all of them to the reference's bytes, and to the same bits among one another.
//!
//! Modules import downwards only: operations (`coding`, `attention`), `dispatch`, `kernels`, then `transform` and `simd`,
//! `format`, and on the ground `lanes`, [`Aligned`], [`memory`] and errors.

#![deny(missing_docs)]

mod aligned;
mod attention;
mod coding;
mod dispatch;
mod element;
mod error;
mod format;
mod kernels;
mod lanes;
mod layer_shape;
mod low_rank;
pub mod memory;
pub mod reference;
mod scratch;
mod simd;
mod stream_id;
mod transform;

pub use aligned::{Aligned, Line};
pub use attention::MAX_TOKENS_AT_ONCE;
pub use coding::Tokens;
pub use dispatch::{product, row_products, weigh};
pub use element::Element;
pub use error::{CodecError, ParseNameError, Result};
pub use format::drift::DRIFT_STEP;
pub use format::gain;
pub use format::layout::{BLOCK_LENS, MAX_HEAD_DIM, side_information_bytes};
pub use format::plane::{pack_plane, plane_bytes, unpack_plane};
pub use format::width::{WIDTHS, Width};
pub use kernels::softmax::rescale_factor;
pub use layer_shape::LayerShape;
pub use low_rank::{LowRank, ORTHONORMAL_LIMIT, Storage};
pub use scratch::Scratch;
pub use simd::isa::{Isa, available_isas, best_isa};
pub use stream_id::{Digest, Side, StreamId};
pub use transform::basis::Basis;
pub use transform::queries::Queries;
pub use transform::rope::{Pairing, Rope, Rotation, RotationWalk};
pub use transform::stream_set::StreamSet;
pub use transform::sums::CoefficientSums;
pub use transform::tables::StreamTables;
