//! A stream's calibrated parameters, and the tables that coding with them needs.

use std::sync::OnceLock;

use crate::block::row_bytes;
use crate::error::{CodecError, Result};
use crate::kernels::WIDE;
use crate::linalg;
use crate::lines::Lines;
use crate::query::QueryTables;
use crate::rope::Rope;
use crate::width::Width;

/// Block lengths the packed format allows.
pub const BLOCK_LENS: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// Largest head_dim the codec accepts.
pub const MAX_HEAD_DIM: usize = 1024;

/// One level of drift, in standard deviations of a coefficient; levels go from −8 to 7.
pub const DRIFT_STEP: f32 = 0.1875;
/// Levels below none.
pub(crate) const DRIFT_HALF: usize = 8;
/// What a token may add to its block's drift, in standard deviations: an outlier must not move the others.
pub(crate) const DRIFT_REACH: f32 = 4.0;

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

/// One coefficient, in the order of storage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Coefficient {
    /// Its column in the synthesis matrix.
    pub(crate) column: usize,
    pub(crate) width: Width,
}

/// A basis made ready for coding blocks of a fixed length.
///
/// All tables are scaled so that coefficients are counted in quantiser steps ([`Width::step`]).
#[derive(Debug, Clone)]
pub struct StreamTables {
    pub(crate) head_dim: usize,
    pub(crate) block_len: usize,
    /// All coefficients: widths fall, then columns rise. Those of width 0, which have drift only, come last.
    pub(crate) coefficients: Vec<Coefficient>,
    /// How many coefficients have eight, four, three, two bits and one; they are stored in that order.
    pub(crate) rows_of_width: [usize; 5],
    /// `[head_dim, head_dim]`: rows of V⁻¹, divided by the step.
    pub(crate) analysis: Vec<f32>,
    /// `[head_dim, head_dim]`: columns of V, times the step.
    pub(crate) synthesis: Vec<f32>,
    /// `[head_dim, block_len]`: V⁻¹·R(δ)·μ in steps.
    pub(crate) coded_mean: Lines<f32>,
    /// `[head_dim, block_len]`: R(δ)·μ.
    pub(crate) shape_mean: Lines<f32>,
    /// `[head_dim]`: cost of a squared error of one step, λᵢ·Δᵢ².
    pub(crate) step_cost: Vec<f32>,
    /// `[n_coded]`: half of the number of levels.
    pub(crate) half_levels: Vec<i32>,
    /// `[n_padded]`: what one level of drift is, in steps of each coefficient.
    pub(crate) drift_units: Lines<f32>,
    /// Bytes of one packed block.
    pub(crate) block_bytes: usize,
    pub(crate) rope: Option<Rope>,
    synthesis_rows: OnceLock<Lines<f32>>,
    query_tables: OnceLock<QueryTables>,
}

impl StreamTables {
    /// Prepares a basis; `rope` is the rotation that the keys carry, `None` for values and unrotated keys.
    ///
    /// # Errors
    /// Wrong array lengths, a block length outside [`BLOCK_LENS`], values that are not finite, a singular synthesis
    /// matrix, a rope wider than the vectors.
    pub fn new(basis: &Basis, rope: Option<&Rope>, block_len: usize) -> Result<Self> {
        let d = basis.mean.len();
        check_basis(basis, rope, block_len)?;
        let inverse = linalg::inverse(&basis.synthesis, d).ok_or(CodecError::SingularBasis)?;

        let mut coefficients: Vec<Coefficient> =
            (0..d).map(|column| Coefficient { column, width: basis.widths[column] }).collect();
        coefficients.sort_by_key(|c| (std::cmp::Reverse(c.width), c.column));

        let mut tables = Self {
            head_dim: d,
            block_len,
            analysis: vec![0.0; d * d],
            synthesis: vec![0.0; d * d],
            coded_mean: Lines::zeros(d * block_len, "a basis")?,
            shape_mean: rotated_means(&basis.mean, rope, block_len)?,
            step_cost: coefficients
                .iter()
                .map(|c| basis.importance[c.column] * c.width.step().powi(2))
                .collect(),
            drift_units: Lines::zeros(d.next_multiple_of(WIDE), "a basis")?,
            half_levels: coefficients
                .iter()
                .filter(|c| c.width != Width::W0)
                .map(|c| c.width.half_levels() as i32)
                .collect(),
            rows_of_width: [Width::W8, Width::W4, Width::W3, Width::W2, Width::W1]
                .map(|width| coefficients.iter().filter(|c| c.width == width).count()),
            coefficients,
            block_bytes: 0,
            rope: rope.cloned(),
            synthesis_rows: OnceLock::new(),
            query_tables: OnceLock::new(),
        };
        let rows: usize = tables.widths().map(|width| row_bytes(width, block_len)).sum();
        tables.block_bytes = tables.rows_at() + rows;
        for (row, c) in tables.coefficients.iter().enumerate() {
            tables.drift_units[row] = DRIFT_STEP / c.width.step();
            let step = f64::from(c.width.step());
            for j in 0..d {
                tables.analysis[row * d + j] = (inverse[c.column * d + j] / step) as f32;
                tables.synthesis[j * d + row] = (f64::from(basis.synthesis[j * d + c.column]) * step) as f32;
            }
            for t in 0..block_len {
                let dot: f64 = (0..d)
                    .map(|j| inverse[c.column * d + j] * f64::from(tables.shape_mean[j * block_len + t]))
                    .sum();
                tables.coded_mean[row * block_len + t] = (dot / step) as f32;
            }
        }
        // The inverse of a nearly singular matrix may be beyond float32.
        for table in [&tables.analysis[..], &tables.synthesis, &tables.coded_mean] {
            if table.iter().any(|value| !value.is_finite()) {
                return Err(CodecError::SingularBasis);
            }
        }
        Ok(tables)
    }

    /// Coefficients rounded up to whole vectors, where they lie across vectors.
    pub(crate) fn n_padded(&self) -> usize {
        self.head_dim.next_multiple_of(WIDE)
    }

    /// μ of one component: at the block's middle, where nothing is turned.
    #[inline(always)]
    pub(crate) fn mean(&self, component: usize) -> f32 {
        self.shape_mean[component * self.block_len + self.block_len / 2]
    }

    /// `[head_dim, n_padded]`: the transposed synthesis, a row for each coefficient; made on first use, because keys
    /// never need it.
    pub(crate) fn synthesis_rows(&self) -> &[f32] {
        self.synthesis_rows.get_or_init(|| {
            let (d, n_padded) = (self.head_dim, self.n_padded());
            let mut rows = vec![0.0f32; d * n_padded];
            for (component, columns) in self.synthesis.chunks_exact(d).enumerate() {
                for (coefficient, value) in columns.iter().enumerate() {
                    rows[coefficient * n_padded + component] = *value;
                }
            }
            Lines::from(&rows[..])
        })
    }

    /// What scoring needs; made on first use, because values never do.
    pub(crate) fn query_tables(&self) -> &QueryTables {
        self.query_tables.get_or_init(|| QueryTables::new(self))
    }

    /// Components of a key or value.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Widths of all coefficients, in the order of storage: they fall.
    pub fn widths(&self) -> impl Iterator<Item = Width> {
        self.coefficients.iter().map(|c| c.width)
    }

    /// `[head_dim, head_dim]`: rows of V⁻¹, in steps.
    #[must_use]
    pub fn analysis(&self) -> &[f32] {
        &self.analysis
    }

    /// `[head_dim, head_dim]`: columns of V, times the step.
    #[must_use]
    pub fn synthesis(&self) -> &[f32] {
        &self.synthesis
    }

    /// `[head_dim, block_len]`: V⁻¹·R(δ)·μ, in steps.
    #[must_use]
    pub fn coded_mean(&self) -> &[f32] {
        &self.coded_mean
    }

    /// `[head_dim, block_len]`: R(δ)·μ.
    #[must_use]
    pub fn shape_mean(&self) -> &[f32] {
        &self.shape_mean
    }

    /// `[head_dim]`: cost of a squared error of one step.
    #[must_use]
    pub fn step_cost(&self) -> &[f32] {
        &self.step_cost
    }

    /// `[head_dim]`: what one level of a block's drift is, in steps.
    #[must_use]
    pub fn drift_units(&self) -> &[f32] {
        &self.drift_units[..self.head_dim]
    }

    /// Coefficients that have a row of codes, at most `head_dim`; the rest follow them and have drift only.
    #[must_use]
    pub fn n_coded(&self) -> usize {
        self.rows_of_width.iter().sum()
    }
}

fn check_basis(basis: &Basis, rope: Option<&Rope>, block_len: usize) -> Result<()> {
    let d = basis.mean.len();
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
        ("the synthesis matrix", basis.synthesis.len(), d * d),
        ("importance", basis.importance.len(), d),
        ("widths", basis.widths.len(), d),
    ] {
        if given != expected {
            return Err(CodecError::Length { what, given, expected });
        }
    }
    for (what, values) in [
        ("the mean", &basis.mean),
        ("the synthesis matrix", &basis.synthesis),
        ("importance", &basis.importance),
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

/// R(δ)·μ for each token of a block, component-major; δ = token − block_len/2.
fn rotated_means(mean: &[f32], rope: Option<&Rope>, block_len: usize) -> Result<Lines<f32>> {
    let mut means = Lines::zeros(mean.len() * block_len, "a basis")?;
    let mut rotated = mean.to_vec();
    for t in 0..block_len {
        if let Some(rope) = rope {
            rotated.copy_from_slice(mean);
            rope.rotation(t as i64 - (block_len / 2) as i64).apply(&mut rotated);
        }
        for (j, value) in rotated.iter().enumerate() {
            means[j * block_len + t] = *value;
        }
    }
    Ok(means)
}
