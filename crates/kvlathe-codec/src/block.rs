//! The packed block: how one stream's codes for `block_len` tokens lie in memory.
//!
//! ```text
//! header u16 little-endian                  block gain code | spacing code << 12
//! side   block_len bytes                    gain fall | guard code << 4, by token
//! drift  ⌈head_dim/2⌉ bytes                 four bits a coefficient
//! rows   n₈ rows of block_len bytes         codes of width 8, one coefficient a row
//!        n₄ rows of block_len/2 bytes       codes of width 4
//!        n₃ rows of block_len·3/8 bytes     codes of width 3
//!        n₂ rows of block_len/4 bytes       codes of width 2
//!        n₁ rows of block_len/8 bytes       codes of width 1
//! ```
//!
//! Coefficients are stored in [`StreamTables`] order. Within a row of width w, byte j holds the tokens
//! j, j + B·w/8, j + 2·B·w/8 … from its low bits up, so that masking and shifting whole vectors of bytes yields runs
//! of consecutive tokens. A row of width 3 is one of width 2, the low bits, and one of width 1, the high ones.

use crate::basis::StreamTables;
use crate::gain::BlockGain;
use crate::width::Width;

/// Bytes in front of the tokens' side information.
pub(crate) const HEADER_BYTES: usize = 2;

/// Bytes of a packed block of one stream beside its rows: gains, guards, drift.
#[must_use]
pub const fn side_information_bytes(head_dim: usize, block_len: usize) -> usize {
    HEADER_BYTES + block_len + head_dim.div_ceil(2)
}

/// Bytes of one coefficient's row.
#[must_use]
pub const fn row_bytes(width: Width, block_len: usize) -> usize {
    block_len * width.bits() / 8
}

impl StreamTables {
    /// Bytes of one packed block of this stream, side information included.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Where the rows begin.
    pub(crate) fn rows_at(&self) -> usize {
        side_information_bytes(self.head_dim, self.block_len)
    }
}

/// A packed block taken apart.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) gain: BlockGain,
    /// `[block_len]`.
    pub(crate) side: &'a [u8],
    /// `[⌈head_dim/2⌉]`.
    pub(crate) drift: &'a [u8],
    pub(crate) rows: &'a [u8],
}

impl<'a> Parts<'a> {
    #[inline(always)]
    pub(crate) fn of(tables: &StreamTables, packed: &'a [u8]) -> Self {
        let (header, rest) = packed.split_at(HEADER_BYTES);
        let (side, rest) = rest.split_at(tables.block_len);
        let (drift, rows) = rest.split_at(tables.head_dim.div_ceil(2));
        Self { gain: BlockGain::unpack(u16::from_le_bytes([header[0], header[1]])), side, drift, rows }
    }
}

/// Packs the drift codes `[head_dim]`, below 16: byte j holds those of the coefficients j and j + ⌈head_dim/2⌉.
#[inline(always)]
pub(crate) fn pack_drift(codes: &[u8], packed: &mut [u8]) {
    let (low, high) = codes.split_at(packed.len());
    packed.copy_from_slice(low);
    for j in 0..high.len() {
        packed[j] |= high[j] << 4;
    }
}

/// The drift code of one coefficient.
#[inline(always)]
pub(crate) fn drift_code(packed: &[u8], coefficient: usize) -> u8 {
    let n = packed.len();
    if coefficient < n { packed[coefficient] & 15 } else { packed[coefficient - n] >> 4 }
}

/// Codes of `bits` bits, those of a byte `row.len()` tokens apart.
#[inline(always)]
fn pack_runs(bits: usize, codes: &[u8], shift: usize, row: &mut [u8]) {
    let n = row.len();
    let mask = (1u16 << bits).wrapping_sub(1) as u8;
    row.fill(0);
    for (k, run) in codes.chunks_exact(n).enumerate() {
        for j in 0..n {
            row[j] |= ((run[j] >> shift) & mask) << (bits * k);
        }
    }
}

/// Adds what [`pack_runs`] has packed to `codes`.
#[inline(always)]
fn unpack_runs(bits: usize, row: &[u8], shift: usize, codes: &mut [u8]) {
    let n = row.len();
    let mask = (1u16 << bits).wrapping_sub(1) as u8;
    for (k, run) in codes.chunks_exact_mut(n).enumerate() {
        for j in 0..n {
            run[j] |= ((row[j] >> (bits * k)) & mask) << shift;
        }
    }
}

/// Packs one row: `codes[t]` is the code of token t, below `2^width`.
#[inline(always)]
pub fn pack_row(width: Width, codes: &[u8], row: &mut [u8]) {
    match width {
        Width::W0 => {}
        Width::W3 => {
            let (low, high) = row.split_at_mut(codes.len() / 4);
            pack_runs(2, codes, 0, low);
            pack_runs(1, codes, 2, high);
        }
        Width::W1 | Width::W2 | Width::W4 | Width::W8 => pack_runs(width.bits(), codes, 0, row),
    }
}

/// Unpacks one row into `codes`, one byte a token.
#[inline(always)]
pub fn unpack_row(width: Width, row: &[u8], codes: &mut [u8]) {
    codes.fill(0);
    match width {
        Width::W0 => {}
        Width::W3 => {
            let (low, high) = row.split_at(codes.len() / 4);
            unpack_runs(2, low, 0, codes);
            unpack_runs(1, high, 2, codes);
        }
        Width::W1 | Width::W2 | Width::W4 | Width::W8 => unpack_runs(width.bits(), row, 0, codes),
    }
}
