//! Packed planes to codes, one byte each.

use crate::format::layout::Layout;
use crate::format::width::Width;

/// How an instruction set unpacks.
pub(crate) trait UnpackCodes {
    /// All coefficients of a block to codes `[⌈n_coded/4⌉, block_len, 4]`, for products over coefficients; what makes up a
    /// last quad is zero.
    fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]);

    /// One coefficient of several blocks to codes of consecutive tokens; `at` is where its plane begins in each block.
    fn unpack_plane_of_blocks(width: Width, block_len: usize, blocks: &[&[u8]], at: usize, codes: &mut [u8]);
}
