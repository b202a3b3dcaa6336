//! Gain-shape transform codec for the key/value streams of transformer models.
//!
//! A *stream* is K or V of one layer and KV head. A calibrated [`Basis`] turns each of its vectors into coefficients
//! that are worth different numbers of bits ([`Width`]s); `block_len` tokens are packed together, component-major, so
//! that a reader streams through whole rows.
//!
//! ```text
//! x ── R(−c) ──▶ block frame ── ÷ γ̂ ──▶ shape ── − R(δ)μ, V⁻¹ ──▶ z ── − drift ── guard, round ──▶ codes
//! ```
//!
//! | step | why |
//! |---|---|
//! | frame | all keys of a block share one rotation: most of the order that RoPE hides comes back |
//! | gain | the error of a token is in proportion to its own size |
//! | mean, transform | the rest is uncorrelated, and ordered by what it is worth to the model |
//! | drift | what a block's tokens have in common beside the mean is stored once, not left to every token's codes |
//! | guard | a token with an outlier takes larger steps instead of clipping |
//!
//! [`reference`] defines the format; `kernels` are fast and give the same bytes.
//!
//! ```
//! use kvlathe_codec::{Basis, Scratch, StreamTables, Tokens, Width, best_isa};
//!
//! // An uncalibrated basis: unit vectors, eight bits each.
//! let d = 16;
//! let mut synthesis = vec![0.0; d * d];
//! (0..d).for_each(|i| synthesis[i * d + i] = 1.0);
//! let basis = Basis { mean: vec![0.0; d], synthesis, importance: vec![1.0; d], widths: vec![Width::W8; d] };
//! let tables = StreamTables::new(&basis, None, 8)?;
//!
//! let x: Vec<f32> = (0..8 * d).map(|i| (i as f32).sin()).collect();
//! let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
//! tables.encode_block(best_isa(), Tokens { data: &x, token_stride: d }, None, &mut packed, &mut scratch)?;
//! let mut decoded = vec![0.0f32; x.len()];
//! tables.decode_block(best_isa(), &packed, None, &mut decoded, &mut scratch)?;
//! assert!(x.iter().zip(&decoded).all(|(a, b)| (a - b).abs() < 0.05));
//! # Ok::<(), kvlathe_codec::CodecError>(())
//! ```

#![deny(missing_docs)]

mod attend;
mod basis;
mod block;
mod element;
mod error;
pub mod gain;
mod kernels;
mod linalg;
mod lines;
mod low_rank;
pub mod memory;
mod query;
pub mod reference;
mod rope;
mod stream;
mod stream_set;
mod width;

pub use attend::{CoefficientSums, MAX_TOKENS_AT_ONCE};
pub use basis::{BLOCK_LENS, Basis, DRIFT_STEP, MAX_HEAD_DIM, StreamTables};
pub use block::{pack_row, row_bytes, side_information_bytes, unpack_row};
pub use element::Element;
pub use error::{CodecError, Result};
pub use kernels::{Isa, Scratch, available_isas, best_isa, product, row_products, shrinkage, weigh};
pub use lines::{Line, Lines};
pub use low_rank::{LowRank, ORTHONORMAL_LIMIT, Storage};
pub use query::Queries;
pub use rope::{Pairing, Rope, Rotation, RotationWalk};
pub use stream::Tokens;
pub use stream_set::StreamSet;
pub use width::{WIDTHS, Width};
