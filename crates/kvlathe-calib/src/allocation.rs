//! Reverse water-filling: all coefficients of a model compete for one budget of bits.

use kvlathe_codec::{WIDTHS, Width};

use crate::error::{CalibError, Result};

/// What an allocation came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// Width of each coefficient, in the order of the importances given.
    pub widths: Vec<Width>,
    /// Mean bits a coefficient, at most what was asked for.
    pub mean_bits: f64,
    /// Σ λᵢ·D(bᵢ): the expected cost, in the metric's units (nats a token, to second order, with Fisher's).
    pub cost: f64,
}

/// Minimises Σ λᵢ·D(bᵢ) subject to mean(bᵢ) ≤ `mean_bits`.
///
/// D is convex over the widths {0, 1, 2, 3, 4, 8}, so taking the upgrades in order of what they save a bit is optimal up to
/// the last one. Ties go to the earlier coefficient, so the result is the same everywhere.
///
/// # Errors
/// A rate outside 0 to 8.
pub fn allocate(importances: &[f32], mean_bits: f64) -> Result<Allocation> {
    if !(0.0..=8.0).contains(&mean_bits) {
        return Err(CalibError::Bits { given: mean_bits });
    }
    let mut upgrades: Vec<(f64, u32, Width, usize)> =
        Vec::with_capacity(importances.len() * (WIDTHS.len() - 1));
    for (at, &importance) in importances.iter().enumerate() {
        for pair in WIDTHS.windows(2) {
            let bits = pair[1].bits() - pair[0].bits();
            let saved = f64::from(importance.max(0.0)) * (pair[0].distortion() - pair[1].distortion());
            upgrades.push((saved / bits as f64, at as u32, pair[1], bits));
        }
    }
    upgrades.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let budget = (mean_bits * importances.len() as f64 + 1e-9).floor() as usize;
    let mut widths = vec![Width::W0; importances.len()];
    let mut spent = 0;
    for (_, at, width, bits) in upgrades {
        if spent + bits > budget {
            break;
        }
        spent += bits;
        widths[at as usize] = width;
    }
    let cost = importances.iter().zip(&widths).map(|(&l, w)| f64::from(l) * w.distortion()).sum();
    Ok(Allocation { widths, mean_bits: spent as f64 / importances.len().max(1) as f64, cost })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_all_allocations() {
        let importances = [5.0f32, 1.0, 0.2, 0.01];
        for budget in 0..=32 {
            let got = allocate(&importances, f64::from(budget) / 4.0).unwrap();
            // Every allocation that costs as many bits or fewer is at least as bad.
            for code in 0..WIDTHS.len().pow(4) {
                let widths: Vec<Width> =
                    (0..4).map(|i| WIDTHS[code / WIDTHS.len().pow(i) % WIDTHS.len()]).collect();
                let bits: usize = widths.iter().map(|w| w.bits()).sum();
                let cost: f64 =
                    importances.iter().zip(&widths).map(|(&l, w)| f64::from(l) * w.distortion()).sum();
                let spent = (got.mean_bits * 4.0).round() as usize;
                assert!(
                    bits > spent || cost >= got.cost - 1e-12,
                    "budget {budget}: {widths:?} beats {got:?}"
                );
            }
        }
    }

    #[test]
    fn rates_out_of_range_are_refused() {
        assert!(allocate(&[1.0], -0.1).is_err());
        assert!(allocate(&[1.0], 8.1).is_err());
        assert!(allocate(&[1.0], f64::NAN).is_err());
    }
}
