//! Scratch: buffers that are reused from block to block.

use crate::kernels::accumulate::SummingBuffers;
use crate::kernels::coding_buffers::CodingBuffers;
use crate::kernels::score::ScoringBuffers;

/// Buffers that coding and attention reuse from block to block.
#[derive(Debug, Default, Clone)]
pub struct Scratch {
    pub(crate) coding: CodingBuffers,
    pub(crate) scoring: ScoringBuffers,
    pub(crate) summing: SummingBuffers,
}
