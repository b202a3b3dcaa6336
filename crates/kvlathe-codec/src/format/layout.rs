//! The layout of a stream's packed blocks: which coefficients they hold, and where each part begins.

use super::gain::BlockGain;
use super::plane::plane_bytes;
use super::width::Width;

/// Block lengths the packed format allows.
pub const BLOCK_LENS: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// Largest head_dim the codec accepts.
pub const MAX_HEAD_DIM: usize = 1024;
/// Bytes in front of the tokens' side information.
pub(crate) const HEADER_BYTES: usize = 2;

/// Bytes of a packed block of one stream beside its planes: gains, guards, drift.
#[must_use]
pub const fn side_information_bytes(head_dim: usize, block_len: usize) -> usize {
    HEADER_BYTES + block_len + head_dim.div_ceil(2)
}

/// Tokens and coefficients of a stream's blocks.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) head_dim: usize,
    pub(crate) block_len: usize,
    /// Those of all coefficients in the order of storage: they fall. Coefficients of width 0, which have drift only, come
    /// last.
    pub(crate) widths: Vec<Width>,
    /// How many coefficients have eight, four, three, two bits and one; they are stored in that order.
    pub(crate) planes_of_width: [usize; 5],
    /// Bytes of one packed block.
    pub(crate) block_bytes: usize,
}

impl Layout {
    /// For coefficients whose widths fall.
    pub(crate) fn new(widths: Vec<Width>, block_len: usize) -> Self {
        let head_dim = widths.len();
        let planes: usize = widths.iter().map(|width| plane_bytes(*width, block_len)).sum();
        Self {
            head_dim,
            block_len,
            planes_of_width: [Width::W8, Width::W4, Width::W3, Width::W2, Width::W1]
                .map(|width| widths.iter().filter(|w| **w == width).count()),
            block_bytes: side_information_bytes(head_dim, block_len) + planes,
            widths,
        }
    }

    /// Coefficients that have a plane; the rest follow them and have drift only.
    #[inline(always)]
    pub(crate) fn n_coded(&self) -> usize {
        self.planes_of_width.iter().sum()
    }

    /// Where the planes begin.
    #[inline(always)]
    pub(crate) fn planes_at(&self) -> usize {
        side_information_bytes(self.head_dim, self.block_len)
    }

    /// A packed block taken apart.
    #[inline(always)]
    pub(crate) fn parts<'a>(&self, packed: &'a [u8]) -> Parts<'a> {
        let (header, rest) = packed.split_at(HEADER_BYTES);
        let (side, rest) = rest.split_at(self.block_len);
        let (drift, planes) = rest.split_at(self.head_dim.div_ceil(2));
        Parts { gain: BlockGain::unpack(u16::from_le_bytes([header[0], header[1]])), side, drift, planes }
    }
}

/// The parts of a packed block.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) gain: BlockGain,
    /// `[block_len]`.
    pub(crate) side: &'a [u8],
    /// `[⌈head_dim/2⌉]`.
    pub(crate) drift: &'a [u8],
    pub(crate) planes: &'a [u8],
}
