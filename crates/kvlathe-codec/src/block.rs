//! The packed block: how one stream's codes for `block_len` tokens lie in memory.
//!
//! ```text
//! side   block_len × u16 little-endian     gain code | guard code << 12, by token
//! rows   n₈ rows of block_len bytes         codes of width 8, one coefficient a row
//!        n₄ rows of block_len/2 bytes       codes of width 4
//!        n₂ rows of block_len/4 bytes       codes of width 2
//! ```
//!
//! Coefficients are stored in [`StreamTables`] order. Within a row of width w, byte j holds the tokens
//! j, j + B·w/8, j + 2·B·w/8 … from its low bits up, so that masking and shifting whole vectors of bytes yields runs
//! of consecutive tokens.

use crate::basis::StreamTables;
use crate::width::Width;

/// Bytes of side information a token and stream.
pub const SIDE_BYTES_PER_TOKEN: usize = 2;

/// Bytes of one coefficient's row.
#[must_use]
pub const fn row_bytes(width: Width, block_len: usize) -> usize {
    block_len * width.bits() / 8
}

impl StreamTables {
    /// Bytes of one packed block of this stream, side information included.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        let rows: usize = self.coded.iter().map(|c| row_bytes(c.width, self.block_len)).sum();
        self.block_len * SIDE_BYTES_PER_TOKEN + rows
    }
}

/// Packs one row: `codes[t]` is the code of token t, below `2^width`.
#[inline(always)]
pub fn pack_row(width: Width, codes: &[u8], row: &mut [u8]) {
    let n = row.len();
    match width {
        Width::W0 => {}
        Width::W2 => {
            let (c0, rest) = codes.split_at(n);
            let (c1, rest) = rest.split_at(n);
            let (c2, c3) = rest.split_at(n);
            for j in 0..n {
                row[j] = c0[j] | (c1[j] << 2) | (c2[j] << 4) | (c3[j] << 6);
            }
        }
        Width::W4 => {
            let (c0, c1) = codes.split_at(n);
            for j in 0..n {
                row[j] = c0[j] | (c1[j] << 4);
            }
        }
        Width::W8 => row.copy_from_slice(codes),
    }
}

/// Unpacks one row into `codes`, one byte a token.
#[inline(always)]
pub fn unpack_row(width: Width, row: &[u8], codes: &mut [u8]) {
    let n = row.len();
    match width {
        Width::W0 => {}
        Width::W2 => {
            for (k, run) in codes.chunks_exact_mut(n).enumerate() {
                for j in 0..n {
                    run[j] = (row[j] >> (2 * k)) & 3;
                }
            }
        }
        Width::W4 => {
            let (c0, c1) = codes.split_at_mut(n);
            for j in 0..n {
                c0[j] = row[j] & 15;
                c1[j] = row[j] >> 4;
            }
        }
        Width::W8 => codes.copy_from_slice(row),
    }
}
