//! All KV heads of one layer's K or V: the unit that a cache layer stores in one block.

use std::sync::Arc;

use super::basis::Basis;
use super::rope::{Rope, Rotation, RotationWalk};
use super::tables::StreamTables;
use crate::error::{CodecError, Result};
use crate::stream_id::StreamId;

/// The streams of one side (keys or values) of a layer.
#[derive(Debug, Clone)]
pub struct StreamSet {
    streams: Vec<StreamTables>,
    rope: Option<Arc<Rope>>,
    /// From block to block, at the first: its steps are the same from everywhere.
    walk: Option<RotationWalk>,
    /// Where each head's packed block begins; one more entry for the end.
    offsets: Vec<usize>,
    id: Option<StreamId>,
}

impl StreamSet {
    /// One basis a KV head; `rope` is the rotation of the keys, `None` for values and unrotated keys.
    ///
    /// # Errors
    /// No heads, heads of different head_dim, or what [`StreamTables::new`] refuses.
    pub fn new(bases: &[Basis], rope: Option<Arc<Rope>>, block_len: usize) -> Result<Self> {
        let Some(first) = bases.first() else {
            return Err(CodecError::Range {
                what: "the number of KV heads",
                given: 0,
                expected: "at least 1",
            });
        };
        for basis in bases {
            if basis.mean.len() != first.mean.len() {
                return Err(CodecError::Length {
                    what: "the mean of a KV head",
                    given: basis.mean.len(),
                    expected: first.mean.len(),
                });
            }
        }
        let streams = bases
            .iter()
            .map(|basis| StreamTables::new(basis, rope.as_deref(), block_len))
            .collect::<Result<Vec<_>>>()?;
        let mut offsets = vec![0];
        for stream in &streams {
            offsets.push(offsets[offsets.len() - 1] + stream.block_bytes());
        }
        let walk = rope.as_ref().map(|rope| rope.walk_back(block_len as i64 / 2, block_len as i64));
        Ok(Self { streams, rope, walk, offsets, id: None })
    }

    /// The same codec with the name that its blocks go by when they leave their cache.
    #[must_use]
    pub fn with_id(self, id: StreamId) -> Self {
        Self { id: Some(id), ..self }
    }

    /// The name that its blocks go by, if it has one: codecs of a preset do.
    #[must_use]
    pub fn id(&self) -> Option<StreamId> {
        self.id
    }

    /// One per KV head.
    #[must_use]
    pub fn streams(&self) -> &[StreamTables] {
        &self.streams
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_len(&self) -> usize {
        self.streams[0].block_len()
    }

    /// Components of a vector.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.streams[0].head_dim()
    }

    /// Bytes of one block of all heads.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.offsets[self.streams.len()]
    }

    /// Bytes of one head within a block of all heads.
    #[must_use]
    pub fn head_range(&self, head: usize) -> std::ops::Range<usize> {
        self.offsets[head]..self.offsets[head + 1]
    }

    /// Mean bits a value, side information included.
    #[must_use]
    pub fn bits_per_value(&self) -> f64 {
        self.block_bytes() as f64 * 8.0 / (self.streams.len() * self.head_dim() * self.block_len()) as f64
    }

    /// The rotation that the keys carry.
    #[must_use]
    pub fn rope(&self) -> Option<&Rope> {
        self.rope.as_deref()
    }

    /// Makes `walk` go from block to block, beginning at R(−c) of that whose first token has position `first_position`;
    /// `None` when nothing is rotated. What was allocated serves again.
    pub fn walk_from(&self, first_position: usize, walk: &mut Option<RotationWalk>) {
        walk.clone_from(&self.walk);
        if let (Some(walk), Some(rope)) = (walk, &self.rope) {
            walk.jump(rope, (first_position + self.block_len() / 2) as i64);
        }
    }

    /// R(−c) and R(c) for the block whose first token has position `first_position`; `None` when nothing is rotated.
    #[must_use]
    pub fn frame(&self, first_position: usize) -> Option<(Rotation, Rotation)> {
        let centre = (first_position + self.block_len() / 2) as i64;
        self.rope.as_ref().map(|rope| (rope.rotation(-centre), rope.rotation(centre)))
    }
}
