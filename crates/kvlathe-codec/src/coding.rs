//! Coding blocks of tokens as a cache holds them: token-major, in the model's number format, rotated.

use crate::dispatch;
use crate::element::Element;
use crate::error::{CodecError, Result, check_len};
use crate::scratch::Scratch;
use crate::simd::isa::Isa;
use crate::transform::rope::Rotation;
use crate::transform::tables::StreamTables;

/// Tokens that are transposed together; divides every block length.
const TRANSPOSE_TOKENS: usize = 8;

/// `block_len` consecutive tokens of one head: token t, component j is `data[t * token_stride + j]`.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, E> {
    /// From the first token's first component on.
    pub data: &'a [E],
    /// Elements from one token to the next.
    pub token_stride: usize,
}

impl StreamTables {
    /// Encodes one block.
    ///
    /// `turn_back` is R(−c) for a block centred at position c (rotated keys), `None` otherwise. `packed` must have
    /// [`StreamTables::block_bytes`] bytes. Inputs must be finite and below [`crate::gain::MAX_MAGNITUDE`]: the cache
    /// checks them where they enter.
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for.
    pub fn encode_block<E: Element>(
        &self,
        isa: Isa,
        tokens: Tokens<'_, E>,
        turn_back: Option<&Rotation>,
        packed: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (d, n) = (self.head_dim(), self.block_len());
        // Tokens may be a view into a longer tensor: only too few are wrong.
        let (given, expected) = (tokens.data.len(), tokens.token_stride.max(d) * (n - 1) + d);
        if given < expected {
            return Err(CodecError::Length { what: "the tokens of a block", given, expected });
        }
        check_len("the packed block", packed.len(), self.block_bytes())?;
        let coding = &mut scratch.coding;
        coding.fit(self)?;
        for t in (0..n).step_by(TRANSPOSE_TOKENS) {
            // A few tokens at a time: whole runs of a row are written, not single elements a row apart.
            let rows: [&[E]; TRANSPOSE_TOKENS] = std::array::from_fn(|i| {
                let at = (t + i) * tokens.token_stride;
                &tokens.data[at..at + d]
            });
            for (j, row) in coding.x.chunks_exact_mut(n).enumerate() {
                for i in 0..TRANSPOSE_TOKENS {
                    row[t + i] = rows[i][j].to_f32();
                }
            }
        }
        if let Some(rotation) = turn_back {
            dispatch::rotate(isa, rotation, &mut coding.x, n);
        }
        dispatch::encode(isa, self, coding, packed);
        Ok(())
    }

    /// Decodes one block into the columns of a component-major matrix: component j of token t goes to
    /// `out[j * stride + t]`.
    ///
    /// `turn_forward` is R(c) where the block was encoded with R(−c).
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for.
    pub fn decode_columns(
        &self,
        isa: Isa,
        packed: &[u8],
        turn_forward: Option<&Rotation>,
        (out, stride): (&mut [f32], usize),
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (d, n) = (self.head_dim(), self.block_len());
        check_len("the packed block", packed.len(), self.block_bytes())?;
        let expected = (d - 1) * stride + n;
        if out.len() < expected {
            return Err(CodecError::Length { what: "the decoded columns", given: out.len(), expected });
        }
        let coding = &mut scratch.coding;
        coding.fit(self)?;
        dispatch::decode(isa, self, packed, coding);
        if let Some(rotation) = turn_forward {
            dispatch::rotate(isa, rotation, &mut coding.x, n);
        }
        for (j, row) in coding.x.chunks_exact(n).enumerate() {
            out[j * stride..j * stride + n].copy_from_slice(row);
        }
        Ok(())
    }

    /// Decodes one block into token-major `out`, `[block_len, head_dim]`.
    ///
    /// `turn_forward` is R(c) where the block was encoded with R(−c).
    ///
    /// # Errors
    /// Buffers of another length than the shapes ask for.
    pub fn decode_block<E: Element>(
        &self,
        isa: Isa,
        packed: &[u8],
        turn_forward: Option<&Rotation>,
        out: &mut [E],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (d, n) = (self.head_dim(), self.block_len());
        check_len("the packed block", packed.len(), self.block_bytes())?;
        check_len("the decoded block", out.len(), d * n)?;
        let coding = &mut scratch.coding;
        coding.fit(self)?;
        dispatch::decode(isa, self, packed, coding);
        if let Some(rotation) = turn_forward {
            dispatch::rotate(isa, rotation, &mut coding.x, n);
        }
        for (group, out) in out.chunks_exact_mut(d * TRANSPOSE_TOKENS).enumerate() {
            for (j, row) in coding.x.chunks_exact(n).enumerate() {
                let values = &row[group * TRANSPOSE_TOKENS..(group + 1) * TRANSPOSE_TOKENS];
                for (i, value) in values.iter().enumerate() {
                    out[i * d + j] = E::from_f32(*value);
                }
            }
        }
        Ok(())
    }
}
