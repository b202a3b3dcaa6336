//! The metric M: what a squared error of a shape costs the model, eᵀ·M·e.

use crate::error::Result;
use crate::symmetric::{eigen, spectral};

/// M ← (1 − a)·M + a·(tr M/d)·I, by default with this a: gradients of a few ten thousand tokens do not pin down the
/// metric's small directions, and a basis that trusts them spends no bits there.
pub const DEFAULT_SHRINKAGE: f64 = 0.3;

/// M^½ and M^−½.
pub(crate) struct Root {
    pub(crate) root: Vec<f64>,
    pub(crate) inverse_root: Vec<f64>,
}

/// Shrinks a symmetric matrix towards a multiple of the identity.
pub(crate) fn shrink(metric: &mut [f64], d: usize, shrinkage: f64) {
    let mean = (0..d).map(|i| metric[i * d + i]).sum::<f64>() / d as f64;
    for (at, value) in metric.iter_mut().enumerate() {
        *value *= 1.0 - shrinkage;
        if at % (d + 1) == 0 {
            *value += shrinkage * mean;
        }
    }
}

/// Square roots of a metric. Directions without any weight get a thousandth of a millionth of the largest, so that
/// the transform stays invertible.
pub(crate) fn roots(metric: &[f64], d: usize) -> Result<Root> {
    let (values, vectors) = eigen(metric, d, "metric")?;
    let floor = (values[0] * 1e-9).max(1e-30);
    Ok(Root {
        root: spectral(&values, &vectors, |v| v.max(floor).sqrt()),
        inverse_root: spectral(&values, &vectors, |v| 1.0 / v.max(floor).sqrt()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shrinkage_keeps_the_trace() {
        let mut m = vec![4.0, 1.0, 1.0, 2.0];
        shrink(&mut m, 2, 0.3);
        let expected = [0.7 * 4.0 + 0.9, 0.7, 0.7, 0.7 * 2.0 + 0.9];
        for (a, b) in m.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12);
        }
    }
}
