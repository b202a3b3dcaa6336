//! The format: what the bytes of a packed block mean.
//!
//! ```text
//! header u16 little-endian                  block gain code | spacing code << 12
//! side   block_len bytes                    gain fall | guard code << 4, by token
//! drift  ⌈head_dim/2⌉ bytes                 four bits a coefficient
//! planes n₈ planes of block_len bytes       codes of width 8, one coefficient a plane
//!        n₄ planes of block_len/2 bytes     codes of width 4
//!        n₃ planes of block_len·3/8 bytes   codes of width 3
//!        n₂ planes of block_len/4 bytes     codes of width 2
//!        n₁ planes of block_len/8 bytes     codes of width 1
//! ```
//!
//! [`layout`] says where each part lies, the others what is in it. [`crate::reference`] is the coder that defines how
//! vectors become these numbers.

pub(crate) mod drift;
pub mod gain;
pub(crate) mod layout;
pub(crate) mod plane;
pub(crate) mod width;
