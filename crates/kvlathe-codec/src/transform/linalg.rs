//! The little dense algebra that loading a preset needs. Calibration, which needs more, uses faer.

/// Inverse of a row-major `n × n` matrix by Gauss-Jordan elimination with partial pivoting, in f64.
///
/// `None` when a pivot vanishes against the matrix's largest entry.
pub(crate) fn inverse(matrix: &[f32], n: usize) -> Option<Vec<f64>> {
    let mut a: Vec<f64> = matrix.iter().map(|&v| f64::from(v)).collect();
    let mut inv = vec![0.0; n * n];
    for i in 0..n {
        inv[i * n + i] = 1.0;
    }
    let largest = a.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for col in 0..n {
        let pivot = (col..n).max_by(|&i, &j| a[i * n + col].abs().total_cmp(&a[j * n + col].abs()))?;
        if a[pivot * n + col].abs() <= largest * 1e-10 {
            return None;
        }
        for k in 0..n {
            a.swap(col * n + k, pivot * n + k);
            inv.swap(col * n + k, pivot * n + k);
        }
        let scale = 1.0 / a[col * n + col];
        for k in 0..n {
            a[col * n + k] *= scale;
            inv[col * n + k] *= scale;
        }
        for row in 0..n {
            let factor = a[row * n + col];
            if row == col || factor == 0.0 {
                continue;
            }
            for k in 0..n {
                a[row * n + k] -= factor * a[col * n + k];
                inv[row * n + k] -= factor * inv[col * n + k];
            }
        }
    }
    Some(inv)
}

#[cfg(test)]
mod tests {
    use super::inverse;

    #[test]
    fn inverse_of_a_known_matrix() {
        // [[4, 7], [2, 6]]⁻¹ = [[0.6, −0.7], [−0.2, 0.4]]
        let inv = inverse(&[4.0, 7.0, 2.0, 6.0], 2).unwrap();
        for (a, b) in inv.iter().zip([0.6, -0.7, -0.2, 0.4]) {
            assert!((a - b).abs() < 1e-12);
        }
    }

    #[test]
    fn singular_matrices_have_none() {
        assert!(inverse(&[1.0, 2.0, 2.0, 4.0], 2).is_none());
        assert!(inverse(&[0.0; 9], 3).is_none());
    }
}
