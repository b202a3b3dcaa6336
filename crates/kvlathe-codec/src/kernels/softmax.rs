//! The exponential part of an online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax",
//! 2018): scores become weights, and a running maximum and sum are kept for each query.

use crate::lanes::{ROUND, WIDE, larger, largest, total};
use crate::simd::multiply::Multiply;

/// Below this, e^x counts as nothing: 10⁻²⁸ of the largest weight is far beyond what a sum in float32 can hold, and products
/// with such weights would be subnormal numbers, which take a processor a hundred times as long.
const NEGLIGIBLE: f32 = -64.0;

/// The factor e^(`score` − `largest`) that brings what was summed for a largest score to a larger one; zero where nothing
/// of it would be left.
#[must_use]
pub fn rescale_factor(score: f32, largest: f32) -> f32 {
    let x = score - largest;
    if x < NEGLIGIBLE { 0.0 } else { x.exp() }
}

/// e^x for x ≤ 0, relative error below 3·10⁻⁷; zero where that is [`NEGLIGIBLE`].
#[inline(always)]
fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts so that r is exact (Cody and Waite).
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    // Taylor's polynomial of degree six: its remainder on |r| ≤ 0.347 is below 1.2·10⁻⁷.
    let mut p = 1.0 / 720.0f32;
    p = p.mul_add(r, 1.0 / 120.0);
    p = p.mul_add(r, 1.0 / 24.0);
    p = p.mul_add(r, 1.0 / 6.0);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x < NEGLIGIBLE { 0.0 } else { p * power }
}

/// Turns `scores` `[n_queries, n]` into weights e^(score − max) and updates each query's running maximum and sum.
///
/// `rescale[q]` receives the factor by which what was summed before must be multiplied (1 if the maximum stayed).
/// Scores of −∞ weigh nothing; a query that sees nothing keeps maximum −∞. NaN among the scores makes the sum NaN, for good.
#[inline(always)]
pub(crate) fn weigh<M: Multiply>(
    scores: &mut [f32],
    n: usize,
    max: &mut [f32],
    sum: &mut [f32],
    rescale: &mut [f32],
) {
    for q in 0..max.len() {
        let scores = &mut scores[q * n..(q + 1) * n];
        let largest = larger(largest_score(scores), max[q]);
        if largest == f32::NEG_INFINITY {
            if scores.iter().any(|score| score.is_nan()) {
                // Not a query that sees nothing, which would give zeros.
                (max[q], sum[q]) = (0.0, f32::NAN);
            }
            scores.fill(0.0);
            rescale[q] = 1.0;
            continue;
        }
        rescale[q] = match max[q] {
            // Mostly, and the exponential of one number takes as long as that of sixteen.
            same if same == largest => 1.0,
            f32::NEG_INFINITY => 0.0,
            smaller => exp(smaller - largest),
        };
        max[q] = largest;
        sum[q] = sum[q].mul_add(rescale[q], exponentials(scores, largest));
    }
}

/// The largest score; NaN counts as less than all.
#[inline(always)]
fn largest_score(scores: &[f32]) -> f32 {
    let (chunks, rest) = scores.as_chunks::<WIDE>();
    let mut lanes = [f32::NEG_INFINITY; WIDE];
    for c in 0..chunks.len() {
        let chunk = &chunks[c];
        for l in 0..WIDE {
            lanes[l] = larger(chunk[l], lanes[l]);
        }
    }
    let mut most = largest(lanes);
    for score in rest {
        most = larger(*score, most);
    }
    most
}

/// Replaces scores by e^(score − largest) and adds them up.
#[inline(always)]
fn exponentials(scores: &mut [f32], largest: f32) -> f32 {
    let (chunks, rest) = scores.as_chunks_mut::<WIDE>();
    let mut lanes = [0.0f32; WIDE];
    for c in 0..chunks.len() {
        let chunk = &mut chunks[c];
        for l in 0..WIDE {
            chunk[l] = exp(chunk[l] - largest);
            lanes[l] += chunk[l];
        }
    }
    let mut sum = total(lanes);
    for score in rest {
        *score = exp(*score - largest);
        sum += *score;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_accurate() {
        for i in 0..=64_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 3e-7 * exact, "{x}");
        }
        assert_eq!(exp(-64.1), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }
}
