//! The calibrated parameters of a stream.

use super::rope::Rope;
use crate::error::{CodecError, Result};
use crate::format::layout::{BLOCK_LENS, MAX_HEAD_DIM};
use crate::format::width::Width;

/// The calibrated transform of one stream (K or V of one layer and KV head).
///
/// A shape s (a key or value divided by its gain) is modelled as s = R(δ)·μ + V·z with z of unit variance; δ is the
/// token's offset from its block's centre. V need not be orthogonal: it is the inverse of a transform that makes
/// equal errors in z cost in proportion to `importance`.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// Mean of the shape μ, `[head_dim]`; before rotation for keys.
    pub mean: Vec<f32>,
    /// Synthesis matrix V, `[head_dim, head_dim]` row-major; column i belongs to coefficient i.
    pub synthesis: Vec<f32>,
    /// What the whole variance of coefficient i costs when it is dropped (λᵢ), `[head_dim]`, at least 0.
    pub importance: Vec<f32>,
    /// Bits of each coefficient, `[head_dim]`.
    pub widths: Vec<Width>,
}

impl Basis {
    /// A basis that nothing was learnt for: no mean, unit vectors, the same width for all.
    #[must_use]
    pub fn uncalibrated(head_dim: usize, width: Width) -> Self {
        let mut synthesis = vec![0.0; head_dim * head_dim];
        synthesis.iter_mut().step_by(head_dim + 1).for_each(|entry| *entry = 1.0);
        let (mean, importance) = (vec![0.0; head_dim], vec![1.0; head_dim]);
        Self { mean, synthesis, importance, widths: vec![width; head_dim] }
    }

    /// Refuses what [`StreamTables::new`](super::tables::StreamTables::new) says.
    pub(super) fn check(&self, rope: Option<&Rope>, block_len: usize) -> Result<()> {
        let d = self.mean.len();
        if d == 0 || d > MAX_HEAD_DIM {
            return Err(CodecError::Range { what: "head_dim", given: d, expected: "1 to 1024" });
        }
        if !BLOCK_LENS.contains(&block_len) {
            return Err(CodecError::Range {
                what: "block_len",
                given: block_len,
                expected: "8, 16, 32, 64, 128 or 256",
            });
        }
        for (what, given, expected) in [
            ("the synthesis matrix", self.synthesis.len(), d * d),
            ("importance", self.importance.len(), d),
            ("widths", self.widths.len(), d),
        ] {
            if given != expected {
                return Err(CodecError::Length { what, given, expected });
            }
        }
        for (what, values) in [
            ("the mean", &self.mean),
            ("the synthesis matrix", &self.synthesis),
            ("importance", &self.importance),
        ] {
            if values.iter().any(|v| !v.is_finite()) {
                return Err(CodecError::NonFiniteParameter { what });
            }
        }
        if let Some(rope) = rope
            && rope.rotary_dim() > d
        {
            return Err(CodecError::Range {
                what: "rotary_dim",
                given: rope.rotary_dim(),
                expected: "at most head_dim",
            });
        }
        Ok(())
    }
}
