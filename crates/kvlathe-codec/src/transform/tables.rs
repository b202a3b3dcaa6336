//! The tables that coding with a basis needs.

use std::cmp::Reverse;
use std::sync::OnceLock;

use super::basis::Basis;
use super::linalg;
use super::query_tables::QueryTables;
use super::rope::Rope;
use crate::aligned::Aligned;
use crate::error::{CodecError, Result};
use crate::format::drift::DRIFT_STEP;
use crate::format::layout::Layout;
use crate::format::width::Width;
use crate::lanes::WIDE;

/// A basis made ready for coding blocks of a fixed length.
///
/// All tables are scaled so that coefficients are counted in quantiser steps ([`Width::step`]).
#[derive(Debug, Clone)]
pub struct StreamTables {
    /// Of blocks; among coefficients of one width, columns of the synthesis rise.
    pub(crate) layout: Layout,
    /// `[head_dim, head_dim]`: rows of V⁻¹, divided by the step.
    pub(crate) analysis: Vec<f32>,
    /// `[head_dim, head_dim]`: columns of V, times the step.
    pub(crate) synthesis: Vec<f32>,
    /// `[head_dim, block_len]`: V⁻¹·R(δ)·μ in steps.
    pub(crate) coded_mean: Aligned<f32>,
    /// `[head_dim, block_len]`: R(δ)·μ.
    pub(crate) shape_mean: Aligned<f32>,
    /// `[head_dim]`: cost of a squared error of one step, λᵢ·Δᵢ².
    pub(crate) step_cost: Vec<f32>,
    /// `[n_coded]`: half of the number of levels.
    pub(crate) half_levels: Vec<i32>,
    /// `[n_padded]`: what one level of drift is, in steps of each coefficient.
    pub(crate) drift_units: Aligned<f32>,
    pub(crate) rope: Option<Rope>,
    synthesis_rows: OnceLock<Aligned<f32>>,
    query_tables: OnceLock<QueryTables>,
}

impl StreamTables {
    /// Prepares a basis; `rope` is the rotation that the keys carry, `None` for values and unrotated keys.
    ///
    /// # Errors
    /// Wrong array lengths, a block length outside [`BLOCK_LENS`](crate::BLOCK_LENS), values that are not finite, a
    /// singular synthesis matrix, a rope wider than the vectors.
    pub fn new(basis: &Basis, rope: Option<&Rope>, block_len: usize) -> Result<Self> {
        let d = basis.mean.len();
        basis.check(rope, block_len)?;
        let inverse = linalg::inverse(&basis.synthesis, d).ok_or(CodecError::SingularBasis)?;

        // The column of each coefficient, in the order of storage.
        let mut columns: Vec<usize> = (0..d).collect();
        columns.sort_by_key(|column| (Reverse(basis.widths[*column]), *column));
        let layout = Layout::new(columns.iter().map(|column| basis.widths[*column]).collect(), block_len);
        let coefficients = || columns.iter().copied().zip(layout.widths.iter().copied());

        let mut tables = Self {
            analysis: vec![0.0; d * d],
            synthesis: vec![0.0; d * d],
            coded_mean: Aligned::zeros(d * block_len, "a basis")?,
            shape_mean: rotated_means(&basis.mean, rope, block_len)?,
            step_cost: coefficients()
                .map(|(column, width)| basis.importance[column] * width.step().powi(2))
                .collect(),
            drift_units: Aligned::zeros(d.next_multiple_of(WIDE), "a basis")?,
            half_levels: layout.widths[..layout.n_coded()]
                .iter()
                .map(|width| width.half_levels() as i32)
                .collect(),
            rope: rope.cloned(),
            synthesis_rows: OnceLock::new(),
            query_tables: OnceLock::new(),
            layout: layout.clone(),
        };
        for (i, (column, width)) in coefficients().enumerate() {
            tables.drift_units[i] = DRIFT_STEP / width.step();
            let step = f64::from(width.step());
            for j in 0..d {
                tables.analysis[i * d + j] = (inverse[column * d + j] / step) as f32;
                tables.synthesis[j * d + i] = (f64::from(basis.synthesis[j * d + column]) * step) as f32;
            }
            for t in 0..block_len {
                let dot: f64 = (0..d)
                    .map(|j| inverse[column * d + j] * f64::from(tables.shape_mean[j * block_len + t]))
                    .sum();
                tables.coded_mean[i * block_len + t] = (dot / step) as f32;
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
        self.layout.head_dim.next_multiple_of(WIDE)
    }

    /// μ of one component: at the block's middle, where nothing is turned.
    #[inline(always)]
    pub(crate) fn mean(&self, component: usize) -> f32 {
        let n = self.layout.block_len;
        self.shape_mean[component * n + n / 2]
    }

    /// `[head_dim, n_padded]`: the transposed synthesis, a row for each coefficient; made on first use, because keys
    /// never need it.
    pub(crate) fn synthesis_rows(&self) -> &[f32] {
        self.synthesis_rows.get_or_init(|| {
            let (d, n_padded) = (self.layout.head_dim, self.n_padded());
            let mut rows = vec![0.0f32; d * n_padded];
            for (component, columns) in self.synthesis.chunks_exact(d).enumerate() {
                for (coefficient, value) in columns.iter().enumerate() {
                    rows[coefficient * n_padded + component] = *value;
                }
            }
            Aligned::from(&rows[..])
        })
    }

    /// What scoring needs; made on first use, because values never do.
    pub(crate) fn query_tables(&self) -> &QueryTables {
        self.query_tables.get_or_init(|| {
            let mean: Vec<f32> = (0..self.layout.head_dim).map(|component| self.mean(component)).collect();
            QueryTables::new(&self.layout, &self.synthesis, &mean, self.rope.as_ref())
        })
    }

    /// Components of a key or value.
    #[must_use]
    #[inline]
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    /// Tokens in a block.
    #[must_use]
    #[inline]
    pub fn block_len(&self) -> usize {
        self.layout.block_len
    }

    /// Bytes of one packed block of this stream, side information included.
    #[must_use]
    #[inline]
    pub fn block_bytes(&self) -> usize {
        self.layout.block_bytes
    }

    /// Widths of all coefficients, in the order of storage: they fall.
    pub fn widths(&self) -> impl Iterator<Item = Width> {
        self.layout.widths.iter().copied()
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
        &self.drift_units[..self.layout.head_dim]
    }

    /// Coefficients that have a plane of codes, at most `head_dim`; the rest follow them and have drift only.
    #[must_use]
    #[inline]
    pub fn n_coded(&self) -> usize {
        self.layout.n_coded()
    }
}

/// R(δ)·μ for each token of a block, component-major; δ = token − block_len/2.
fn rotated_means(mean: &[f32], rope: Option<&Rope>, block_len: usize) -> Result<Aligned<f32>> {
    let mut means = Aligned::zeros(mean.len() * block_len, "a basis")?;
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
