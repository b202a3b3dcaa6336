//! [`UnpackCodes`] for NEON: the portable text, compiled for it.

use crate::format::layout::Layout;
use crate::format::width::Width;
use crate::simd::isa::{Neon, Portable};
use crate::simd::unpack_codes::UnpackCodes;

impl UnpackCodes for Neon {
    #[inline(always)]
    fn unpack_quads(layout: &Layout, planes: &[u8], codes: &mut [u8]) {
        Portable::unpack_quads(layout, planes, codes);
    }

    #[inline(always)]
    fn unpack_plane_of_blocks(width: Width, block_len: usize, blocks: &[&[u8]], at: usize, codes: &mut [u8]) {
        Portable::unpack_plane_of_blocks(width, block_len, blocks, at, codes);
    }
}
