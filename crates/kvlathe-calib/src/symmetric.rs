//! Symmetric matrices: accumulation, rotation averages, eigenvectors, square roots. Row-major f64, full storage.

use faer::{Mat, Side};
use kvlathe_codec::{Pairing, Rope};

use crate::error::{CalibError, Result};

/// Adds x·xᵀ to the lower triangle of `outer`.
#[inline]
pub(crate) fn add_outer(outer: &mut [f64], x: &[f64]) {
    let d = x.len();
    for (i, row) in outer.chunks_exact_mut(d).enumerate() {
        let xi = x[i];
        for (sum, xj) in row[..=i].iter_mut().zip(x) {
            *sum += xi * xj;
        }
    }
}

/// Full symmetric matrix from a lower triangle, every entry times `scale`.
pub(crate) fn mirrored(lower: &[f64], d: usize, scale: f64) -> Vec<f64> {
    let mut full = vec![0.0; d * d];
    for i in 0..d {
        for j in 0..=i {
            let value = lower[i * d + j] * scale;
            full[i * d + j] = value;
            full[j * d + i] = value;
        }
    }
    full
}

/// Eigenvalues in falling order and eigenvectors as columns, row-major `[d, d]`.
///
/// Signs are fixed (the largest component of each vector is positive), so that equal input gives equal output.
pub(crate) fn eigen(matrix: &[f64], d: usize, what: &'static str) -> Result<(Vec<f64>, Vec<f64>)> {
    if matrix.iter().any(|v| !v.is_finite()) {
        return Err(CalibError::Eigen { what });
    }
    let mat = Mat::from_fn(d, d, |i, j| matrix[i * d + j]);
    let decomposition = mat.self_adjoint_eigen(Side::Lower).map_err(|_| CalibError::Eigen { what })?;
    let (u, s) = (decomposition.U(), decomposition.S());
    let mut values = vec![0.0; d];
    let mut vectors = vec![0.0; d * d];
    for rank in 0..d {
        // faer sorts rising.
        let column = d - 1 - rank;
        values[rank] = s[column];
        let largest =
            (0..d).map(|i| u[(i, column)]).fold(0.0f64, |m, v| if v.abs() > m.abs() { v } else { m });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        for i in 0..d {
            vectors[i * d + rank] = sign * u[(i, column)];
        }
    }
    Ok((values, vectors))
}

/// Σᵢ f(λᵢ)·eᵢ·eᵢᵀ of an eigendecomposition.
pub(crate) fn spectral(values: &[f64], vectors: &[f64], f: impl Fn(f64) -> f64) -> Vec<f64> {
    let d = values.len();
    let mut out = vec![0.0; d * d];
    for (k, &value) in values.iter().enumerate() {
        let weight = f(value);
        for i in 0..d {
            let scaled = weight * vectors[i * d + k];
            for j in 0..d {
                out[i * d + j] += scaled * vectors[j * d + k];
            }
        }
    }
    out
}

/// a·b of row-major square matrices.
pub(crate) fn product(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    let mut out = vec![0.0; d * d];
    for i in 0..d {
        for k in 0..d {
            let factor = a[i * d + k];
            for j in 0..d {
                out[i * d + j] += factor * b[k * d + j];
            }
        }
    }
    out
}

/// Mean of R(δ)·S·R(δ)ᵀ over the given offsets.
///
/// The moments of un-rotated keys become those of keys in a block's frame: a token is as likely at one offset of its
/// block as at another, so one calibration serves every block length.
pub(crate) fn rotation_average(matrix: &[f64], d: usize, rope: &Rope, offsets: &[i64]) -> Vec<f64> {
    let mut mean = vec![0.0; d * d];
    for &offset in offsets {
        let mut turned = matrix.to_vec();
        rotate_columns(&mut turned, d, rope, offset);
        transpose(&mut turned, d);
        rotate_columns(&mut turned, d, rope, offset);
        for (sum, value) in mean.iter_mut().zip(&turned) {
            *sum += value / offsets.len() as f64;
        }
    }
    mean
}

/// R(offset)·matrix: every column is a vector and is rotated.
fn rotate_columns(matrix: &mut [f64], d: usize, rope: &Rope, offset: i64) {
    for (i, frequency) in rope.inv_freq().iter().enumerate() {
        let (a, b) = match rope.pairing() {
            Pairing::HalfSplit => (i, i + rope.rotary_dim() / 2),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (frequency * offset as f64).sin_cos();
        for column in 0..d {
            let (xa, xb) = (matrix[a * d + column], matrix[b * d + column]);
            matrix[a * d + column] = xa * cos - xb * sin;
            matrix[b * d + column] = xb * cos + xa * sin;
        }
    }
}

fn transpose(matrix: &mut [f64], d: usize) {
    for i in 0..d {
        for j in 0..i {
            matrix.swap(i * d + j, j * d + i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigen_of_a_known_matrix() {
        // [[2, 1], [1, 2]]: 3 with (1, 1)/√2, 1 with (1, −1)/√2
        let (values, vectors) = eigen(&[2.0, 1.0, 1.0, 2.0], 2, "test").unwrap();
        assert!((values[0] - 3.0).abs() < 1e-12 && (values[1] - 1.0).abs() < 1e-12);
        assert!((vectors[0] - 0.5f64.sqrt()).abs() < 1e-12 && (vectors[2] - 0.5f64.sqrt()).abs() < 1e-12);
        let root = spectral(&values, &vectors, f64::sqrt);
        let squared = product(&root, &root, 2);
        for (a, b) in squared.iter().zip([2.0, 1.0, 1.0, 2.0]) {
            assert!((a - b).abs() < 1e-12);
        }
    }

    #[test]
    fn full_turns_average_to_isotropy() {
        // Over a whole turn, R S Rᵀ of a 2 × 2 matrix averages to (tr S / 2)·I.
        let rope = Rope::new(Pairing::HalfSplit, 2, vec![std::f64::consts::PI / 4.0]).unwrap();
        let offsets: Vec<i64> = (0..8).collect();
        let mean = rotation_average(&[3.0, 0.5, 0.5, 1.0], 2, &rope, &offsets);
        for (a, b) in mean.iter().zip([2.0, 0.0, 0.0, 2.0]) {
            assert!((a - b).abs() < 1e-12);
        }
    }
}
