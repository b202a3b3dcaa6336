//! From moments to a basis: the generalised Karhunen-Loève transform.
//!
//! With C the covariance of the shape and M the metric, M^½·C·M^½ = E·Λ·Eᵀ. The coefficients y = Eᵀ·M^½·(s − μ) are
//! uncorrelated, and an error in any of them costs the same; Λᵢ is the cost of dropping coefficient i. Scaled to unit
//! variance, z = Λ^−½·y, and the synthesis is V = M^−½·E·Λ^½.

use kvlathe_codec::{Basis, LowRank, Rope, Storage, Width};

use crate::error::{CalibError, Result};
use crate::metric::{DEFAULT_SHRINKAGE, roots, shrink};
use crate::moments::{SharedMoments, StreamMoments};
use crate::symmetric::{eigen, mirrored, product, rotation_average};

/// Distances from query to key that the gradient-free key metric averages over, in tokens.
const FALLBACK_DISTANCES: [i64; 8] = [128, 181, 256, 362, 512, 724, 1024, 2048];
/// Variances below this share of the largest are raised to it: the synthesis matrix must stay invertible in float16.
const LEAST_RELATIVE_VARIANCE: f64 = 1e-6;

/// How a stream is designed.
#[derive(Debug, Clone, PartialEq)]
pub struct DesignOptions {
    /// Tokens in a block; the frame of keys depends on it.
    pub block_len: usize,
    /// Share of the metric that is replaced by a multiple of the identity, 0 to 1.
    pub shrinkage: f64,
}

impl Default for DesignOptions {
    fn default() -> Self {
        Self { block_len: 64, shrinkage: DEFAULT_SHRINKAGE }
    }
}

/// Where the metric of a stream comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Metric {
    /// `E[γ²·g·gᵀ]` of the accumulated gradients.
    Fisher,
    /// `E[q·qᵀ]` of the accumulated queries, turned to typical distances, times `weight` and `E[γ²]`.
    Queries {
        /// Cost of a unit squared error of a score.
        weight: f64,
    },
    /// A given matrix `[head_dim, head_dim]` (for values: the output projection's Gram matrix), times `E[γ²]`.
    Given(Vec<f64>),
}

/// Designs the basis of one stream; its widths are all zero until bits are allocated.
///
/// `rope` is the rotation of keys, `None` for values and unrotated keys.
///
/// # Errors
/// Fewer tokens than two a component, moments that are not finite, a metric of another size.
pub fn design_stream(
    moments: &StreamMoments,
    rope: Option<&Rope>,
    metric: &Metric,
    options: &DesignOptions,
) -> Result<Basis> {
    let d = moments.head_dim;
    let needed = 2 * d as u64;
    if moments.n_tokens < needed {
        return Err(CalibError::TooFewTokens { given: moments.n_tokens, head_dim: d, needed });
    }
    let n = moments.n_tokens as f64;
    let (mean, mut covariance) = mean_and_covariance(&moments.shape_sum, &moments.shape_outer, n);
    let mut weight = metric_matrix(moments, rope, metric)?;
    if let Some(rope) = rope {
        let half = (options.block_len / 2) as i64;
        let offsets: Vec<i64> = (-half..half).collect();
        covariance = rotation_average(&covariance, d, rope, &offsets);
        weight = rotation_average(&weight, d, rope, &offsets);
    }
    shrink(&mut weight, d, options.shrinkage);

    let root = roots(&weight, d)?;
    let weighted = product(&product(&root.root, &covariance, d), &root.root, d);
    let (values, vectors) = eigen(&weighted, d, "weighted covariance")?;
    let floor = (values[0] * LEAST_RELATIVE_VARIANCE).max(1e-30);
    let mut synthesis = product(&root.inverse_root, &vectors, d);
    for row in synthesis.chunks_exact_mut(d) {
        for (entry, value) in row.iter_mut().zip(&values) {
            *entry *= value.max(floor).sqrt();
        }
    }
    Ok(Basis {
        mean: mean.iter().map(|v| *v as f32).collect(),
        synthesis: synthesis.iter().map(|v| *v as f32).collect(),
        importance: values.iter().map(|v| v.max(0.0) as f32).collect(),
        widths: vec![Width::W0; d],
    })
}

/// Mean and covariance of `n` vectors from their sum and the lower triangle of their summed outer products.
fn mean_and_covariance(sum: &[f64], outer: &[f64], n: f64) -> (Vec<f64>, Vec<f64>) {
    let d = sum.len();
    let mean: Vec<f64> = sum.iter().map(|s| s / n).collect();
    let mut covariance = mirrored(outer, d, 1.0 / n);
    for i in 0..d {
        for j in 0..d {
            covariance[i * d + j] -= mean[i] * mean[j];
        }
    }
    (mean, covariance)
}

fn metric_matrix(moments: &StreamMoments, rope: Option<&Rope>, metric: &Metric) -> Result<Vec<f64>> {
    let d = moments.head_dim;
    let gain_squared = moments.gain_squared_sum / (moments.n_tokens.max(1)) as f64;
    match metric {
        Metric::Fisher => Ok(mirrored(&moments.fisher_outer, d, 1.0 / moments.n_fisher.max(1) as f64)),
        Metric::Queries { weight } => {
            let scale = weight * gain_squared / moments.n_queries.max(1) as f64;
            let outer = mirrored(&moments.query_outer, d, scale);
            // A score is [R(Δ)·q]·k with both before rotation and Δ the distance.
            Ok(rope.map_or(outer.clone(), |rope| rotation_average(&outer, d, rope, &FALLBACK_DISTANCES)))
        }
        Metric::Given(matrix) => {
            if matrix.len() != d * d {
                return Err(CalibError::Length { what: "the metric", given: matrix.len(), expected: d * d });
            }
            Ok(matrix.iter().map(|v| v * gain_squared).collect())
        }
    }
}

/// The seed's transform: the `rank` leading principal directions of the pooled raw vectors.
///
/// # Errors
/// A rank outside 1..=head_dim, fewer vectors than two a component.
pub fn design_shared(
    moments: &SharedMoments,
    rank: usize,
    storage: Storage,
) -> Result<(LowRank, Vec<f32>, Vec<f32>)> {
    let d = moments.head_dim;
    if moments.n_vectors < 2 * d as u64 {
        return Err(CalibError::TooFewTokens { given: moments.n_vectors, head_dim: d, needed: 2 * d as u64 });
    }
    let n = moments.n_vectors as f64;
    let (mean, covariance) = mean_and_covariance(&moments.sum, &moments.outer, n);
    let (_, vectors) = eigen(&covariance, d, "covariance")?;
    let u: Vec<f32> =
        (0..d).flat_map(|i| vectors[i * d..i * d + rank.min(d)].iter().map(|v| *v as f32)).collect();
    let mean: Vec<f32> = mean.iter().map(|v| *v as f32).collect();
    let coder = LowRank::new(&u, &mean, rank, storage)?;
    Ok((coder, u, mean))
}
