//! Kernels: coding and attention, written once over [`crate::simd`].
//!
//! They put the tokens of a block side by side in vectors and keep the reference's order of operations for each token, so
//! every instruction set gives the reference's bytes. Loops over tokens are innermost and free of branches, for the
//! vectoriser, and there are no closures: the compiler would build them without the caller's instruction set.

pub(crate) mod accumulate;
pub(crate) mod coding_buffers;
pub(crate) mod decode;
pub(crate) mod encode;
pub(crate) mod frame;
pub(crate) mod product;
pub(crate) mod score;
mod side;
pub(crate) mod softmax;
pub(crate) mod widen;
