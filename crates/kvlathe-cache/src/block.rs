//! Packed blocks: immutable once made, shared by beams and copies.

use std::sync::Arc;

use bytemuck::Zeroable;
use kvlathe_codec::{Element, Isa, Line, Scratch, StreamSet, memory};

use crate::error::Result;
use crate::exact::ExactRun;

/// `block_len` tokens of all KV heads of one side and batch row, 64-byte aligned.
pub(crate) struct Block(Box<[Line]>);

impl Block {
    /// Encodes `block_len` tokens of `tokens` from `first` on; they begin at position `position`.
    pub(crate) fn encode<E: Element>(
        set: &StreamSet,
        tokens: &ExactRun<E>,
        first: usize,
        position: usize,
        isa: Isa,
        scratch: &mut Scratch,
    ) -> Result<Arc<Self>> {
        let n_lines = set.block_bytes().div_ceil(size_of::<Line>());
        let mut lines = memory::filled(n_lines, Line::zeroed(), "a packed block")?.into_boxed_slice();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        let frame = set.frame(position);
        let turn_back = frame.as_ref().map(|(back, _)| back);
        for (head, stream) in set.streams().iter().enumerate() {
            let packed = &mut bytes[set.head_range(head)];
            stream.encode_block(isa, tokens.tokens_from(head, first), turn_back, packed, scratch)?;
        }
        Ok(Arc::new(Self(lines)))
    }

    /// Decodes one head into `[block_len, head_dim]`.
    pub(crate) fn decode<E: Element>(
        &self,
        set: &StreamSet,
        head: usize,
        position: usize,
        isa: Isa,
        out: &mut [E],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let frame = set.frame(position);
        let turn_forward = frame.as_ref().map(|(_, forward)| forward);
        let packed = &self.packed()[set.head_range(head)];
        Ok(set.streams()[head].decode_block(isa, packed, turn_forward, out, scratch)?)
    }

    /// The packed bytes of all heads, with the padding to a whole line.
    pub(crate) fn packed(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    /// Bytes allocated, with the reference counts and one pointer to the block.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.0) + size_of::<Self>() + 3 * size_of::<usize>()
    }
}
