//! Buffers of encoding and decoding.

use crate::aligned::Aligned;
use crate::error::Result;
use crate::transform::tables::StreamTables;

/// What coding one block needs.
#[derive(Debug, Default, Clone)]
pub(crate) struct CodingBuffers {
    /// `[head_dim, block_len]` vectors, component-major.
    pub(crate) x: Aligned<f32>,
    /// `[head_dim, block_len]` coefficients in steps.
    pub(super) z: Aligned<f32>,
    /// Codes of one coefficient, or those of the drift.
    pub(super) codes: Aligned<u8>,
    /// `[block_len]`.
    pub(super) gain_codes: Aligned<u16>,
    /// `[n_padded]` drift in steps.
    pub(super) drift: Aligned<f32>,
    /// `[block_len]` gains and step factors of tokens.
    pub(super) gains: Aligned<f32>,
    pub(super) scales: Aligned<f32>,
}

impl CodingBuffers {
    /// Sizes them for a stream.
    pub(crate) fn fit(&mut self, tables: &StreamTables) -> Result<()> {
        let (d, n, what) = (tables.head_dim(), tables.block_len(), "the codec's buffers");
        self.x.resize(d * n, what)?;
        self.z.resize(d * n, what)?;
        self.codes.resize(d.max(n), what)?;
        self.gain_codes.resize(n, what)?;
        self.drift.resize(tables.n_padded(), what)?;
        self.gains.resize(n, what)?;
        self.scales.resize(n, what)
    }
}
