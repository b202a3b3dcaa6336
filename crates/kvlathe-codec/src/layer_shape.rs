//! How much one layer caches of a token.

use crate::stream_id::Side;

/// Sizes of what one layer caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// KV heads.
    pub n_kv_heads: usize,
    /// Components of a head's key, in `1..=`[`MAX_HEAD_DIM`](crate::MAX_HEAD_DIM).
    pub key_dim: usize,
    /// Components of a head's value, in the same range.
    pub value_dim: usize,
}

impl LayerShape {
    /// Components of a head's key or value.
    #[must_use]
    pub fn dim(&self, side: Side) -> usize {
        match side {
            Side::Key => self.key_dim,
            Side::Value => self.value_dim,
        }
    }
}
