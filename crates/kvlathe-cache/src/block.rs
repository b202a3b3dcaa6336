//! Packed blocks: immutable once made, shared by beams, copies and whoever they were exported to.

use bytemuck::Zeroable;
use bytes::Bytes;
use kvlathe_codec::{Element, Line, Scratch, StreamSet, Tokens, best_isa, memory};

use crate::error::Result;
use crate::exact::ExactRun;
use crate::workspace::with_workspace;

/// The bytes of a block that this crate has coded, 64-byte aligned.
struct Coded(Box<[Line]>);

impl AsRef<[u8]> for Coded {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// `block_len` tokens of all KV heads of one side and batch row.
#[derive(Clone)]
pub(crate) struct PackedBlock {
    bytes: Bytes,
    /// Whether the memory is this crate's, to count; else somebody else's, a mapped file for example.
    is_own: bool,
}

impl PackedBlock {
    /// Bytes that somebody else has made, or the same again.
    pub(crate) fn imported(bytes: Bytes) -> Self {
        Self { bytes, is_own: false }
    }

    /// The packed bytes of all heads, without what fills the last cache line.
    pub(crate) fn shared(&self, set: &StreamSet) -> Bytes {
        self.bytes.slice(..set.block_bytes())
    }

    /// The packed bytes of all heads; there may be more behind them.
    pub(crate) fn packed(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn is_own(&self) -> bool {
        self.is_own
    }

    /// Bytes that the block takes: with the cache line's rest, its place in the list, what counts its users and frees it.
    pub(crate) fn n_bytes(&self) -> usize {
        self.bytes.len() + size_of::<Self>() + size_of::<Coded>() + 2 * size_of::<usize>()
    }

    /// Decodes one head of the block at `position` into `[block_len, head_dim]`.
    pub(crate) fn decode<E: Element>(
        &self,
        set: &StreamSet,
        head: usize,
        position: usize,
        out: &mut [E],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let frame = set.frame(position);
        let turn_forward = frame.as_ref().map(|(_, forward)| forward);
        let packed = &self.packed()[set.head_range(head)];
        Ok(set.streams()[head].decode_block(best_isa(), packed, turn_forward, out, scratch)?)
    }
}

/// A block to be coded: a piece of work that one thread takes.
pub(crate) struct Encoding<'a, E> {
    pub(crate) set: &'a StreamSet,
    /// Where its tokens are, from the `first` of them on.
    pub(crate) tokens: &'a ExactRun<E>,
    pub(crate) first: usize,
    /// Slots in front of them whose tokens are kept elsewhere, or nowhere any more: coded as zero vectors.
    pub(crate) n_placeholders: usize,
    /// Of the block's first slot, a multiple of its length.
    pub(crate) position: usize,
    pub(crate) block: &'a mut Option<PackedBlock>,
}

impl<E: Element> Encoding<'_, E> {
    pub(crate) fn encode(self) -> Result<()> {
        let Self { set, tokens, first, n_placeholders, position, block } = self;
        let n_lines = set.block_bytes().div_ceil(size_of::<Line>());
        let mut lines = memory::filled(n_lines, Line::zeroed(), "a packed block")?.into_boxed_slice();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        let frame = set.frame(position);
        let turn_back = frame.as_ref().map(|(back, _)| back);
        let d = set.head_dim();
        for (head, stream) in set.streams().iter().enumerate() {
            let packed = &mut bytes[set.head_range(head)];
            let of_head = &tokens.head(head)[first * d..];
            with_workspace(|workspace| {
                let scratch = &mut workspace.scratch;
                if n_placeholders == 0 {
                    let tokens = Tokens { data: of_head, token_stride: d };
                    return stream.encode_block(best_isa(), tokens, turn_back, packed, scratch);
                }
                let mut data = memory::filled(set.block_len() * d, E::default(), "tokens of a block")?;
                let kept = &mut data[n_placeholders * d..];
                kept.copy_from_slice(&of_head[..kept.len()]);
                let tokens = Tokens { data: &data, token_stride: d };
                stream.encode_block(best_isa(), tokens, turn_back, packed, scratch)
            })?;
        }
        *block = Some(PackedBlock { bytes: Bytes::from_owner(Coded(lines)), is_own: true });
        Ok(())
    }
}

/// A block's head to be decoded, a part of its tokens at least: a piece of work that one thread takes.
pub(crate) struct Decoding<'a, E> {
    pub(crate) set: &'a StreamSet,
    pub(crate) block: &'a PackedBlock,
    pub(crate) head: usize,
    /// Of the block's first slot.
    pub(crate) position: usize,
    /// Slots that are wanted.
    pub(crate) within: std::ops::Range<usize>,
    /// `[within, head_dim]`.
    pub(crate) out: &'a mut [E],
}

impl<E: Element> Decoding<'_, E> {
    pub(crate) fn decode(self) -> Result<()> {
        let Self { set, block, head, position, within, out } = self;
        with_workspace(|workspace| {
            let (len, d, scratch) = (set.block_len(), set.head_dim(), &mut workspace.scratch);
            if within.len() == len {
                return block.decode(set, head, position, out, scratch);
            }
            let mut whole = memory::filled(len * d, E::default(), "a decoded block")?;
            block.decode(set, head, position, &mut whole, scratch)?;
            out.copy_from_slice(&whole[within.start * d..within.end * d]);
            Ok(())
        })
    }
}
