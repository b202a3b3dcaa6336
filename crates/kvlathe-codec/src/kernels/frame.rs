//! Queries in a block's frame, and what the mean of its keys contributes to their scores.
//!
//! Loops take eight values at a time explicitly, from and into arrays of eight: blocks are short, and the compiler's
//! own vector loops would leave most of their work to the remainder.

use super::lanes::{LANES, Lanes, groups, groups_mut};
use super::multiply::Multiply;
use crate::query::MeanTables;
use crate::rope::Rotation;

/// Turns queries `[n_queries, d]` whose pairs lie half-split.
#[inline(always)]
pub(super) fn turn(rotation: &Rotation, queries: &[f32], turned: &mut [f32], d: usize) {
    let (cos, sin) = (rotation.cos(), rotation.sin());
    let n_pairs = cos.len();
    let whole = n_pairs / LANES * LANES;
    for first in (0..queries.len()).step_by(d) {
        let (from, to) = (&queries[first..first + d], &mut turned[first..first + d]);
        let (a, b) = (&from[..n_pairs], &from[n_pairs..2 * n_pairs]);
        let (to_a, to_rest) = to.split_at_mut(n_pairs);
        let (to_b, to_rest) = to_rest.split_at_mut(n_pairs);
        turn_groups(groups(a), groups(b), (groups(cos), groups(sin)), groups_mut(to_a), groups_mut(to_b));
        for i in whole..n_pairs {
            to_a[i] = a[i].mul_add(cos[i], -(b[i] * sin[i]));
            to_b[i] = b[i].mul_add(cos[i], a[i] * sin[i]);
        }
        to_rest.copy_from_slice(&from[2 * n_pairs..]);
    }
}

#[inline(always)]
fn turn_groups(
    a: &[Lanes],
    b: &[Lanes],
    (cos, sin): (&[Lanes], &[Lanes]),
    to_a: &mut [Lanes],
    to_b: &mut [Lanes],
) {
    // Equal lengths known beforehand: no checks inside the loop.
    let n = a.len();
    let (b, cos, sin) = (&b[..n], &cos[..n], &sin[..n]);
    let (to_a, to_b) = (&mut to_a[..n], &mut to_b[..n]);
    for g in 0..n {
        let (a, b, cos, sin) = (a[g], b[g], cos[g], sin[g]);
        let (mut new_a, mut new_b) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            new_a[l] = a[l].mul_add(cos[l], -(b[l] * sin[l]));
            new_b[l] = b[l].mul_add(cos[l], a[l] * sin[l]);
        }
        (to_a[g], to_b[g]) = (new_a, new_b);
    }
}

/// `scores[q, t]` = q·R(δ)·μ for queries `turned` to the block's frame; see [`MeanTables`] for the symmetry.
///
/// `parts` holds at least `n_queries · (d + 2·width)` values.
#[inline(always)]
pub(super) fn score_mean<M: Multiply>(
    tables: &MeanTables,
    turned: &[f32],
    parts: &mut [f32],
    scores: &mut [f32],
    (d, n): (usize, usize),
) {
    let MeanTables { n_pairs, n_even, width, .. } = *tables;
    let n_queries = turned.len() / d;
    let (even, rest) = parts.split_at_mut(n_queries * n_even);
    let (odd, rest) = rest.split_at_mut(n_queries * n_pairs);
    let (even_scores, rest) = rest.split_at_mut(n_queries * width);
    let odd_scores = &mut rest[..n_queries * width];
    for q in 0..n_queries {
        let query = &turned[q * d..(q + 1) * d];
        let even = &mut even[q * n_even..(q + 1) * n_even];
        multiply_pairs(&tables.turned, query, even, &mut odd[q * n_pairs..(q + 1) * n_pairs]);
    }
    M::multiply(even, &tables.even, even_scores, (n_even, width));
    M::multiply(odd, &tables.odd, odd_scores, (n_pairs, width));
    for q in 0..n_queries {
        let (even, odd) = (&even_scores[q * width..(q + 1) * width], &odd_scores[q * width..(q + 1) * width]);
        join_halves(even, odd, &mut scores[q * n..(q + 1) * n]);
    }
}

/// The even and odd coefficients of one query: of each pair, then of the components that do not turn.
#[inline(always)]
fn multiply_pairs(mean: &[f32], query: &[f32], even: &mut [f32], odd: &mut [f32]) {
    let (n_pairs, d) = (odd.len(), query.len());
    let (a, b) = (&query[..n_pairs], &query[n_pairs..2 * n_pairs]);
    let (mean_a, mean_b) = (&mean[..n_pairs], &mean[n_pairs..2 * n_pairs]);
    let (even, even_rest) = even.split_at_mut(n_pairs);
    {
        let n = n_pairs / LANES;
        let (a, b) = (&groups(a)[..n], &groups(b)[..n]);
        let (mean_a, mean_b) = (&groups(mean_a)[..n], &groups(mean_b)[..n]);
        let (even, odd) = (&mut groups_mut(even)[..n], &mut groups_mut(odd)[..n]);
        for g in 0..n {
            let (a, b, mean_a, mean_b) = (a[g], b[g], mean_a[g], mean_b[g]);
            let (mut new_even, mut new_odd) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                new_even[l] = a[l].mul_add(mean_a[l], b[l] * mean_b[l]);
                new_odd[l] = b[l].mul_add(mean_a[l], -(a[l] * mean_b[l]));
            }
            (even[g], odd[g]) = (new_even, new_odd);
        }
    }
    for i in n_pairs / LANES * LANES..n_pairs {
        even[i] = a[i].mul_add(mean_a[i], b[i] * mean_b[i]);
        odd[i] = b[i].mul_add(mean_a[i], -(a[i] * mean_b[i]));
    }
    let (rest, mean) = (&query[2 * n_pairs..d], &mean[2 * n_pairs..d]);
    let even_rest = &mut even_rest[..rest.len()];
    for i in 0..rest.len() {
        even_rest[i] = rest[i] * mean[i];
    }
}

/// Scores of the tokens after a block's middle are even + odd, those before it, backwards, even − odd.
#[inline(always)]
fn join_halves(even: &[f32], odd: &[f32], scores: &mut [f32]) {
    let half = scores.len() / 2;
    let (before, after) = scores.split_at_mut(half);
    {
        let n = half / LANES;
        let (even, odd) = (&groups(even)[..n], &groups(odd)[..n]);
        let (before, after) =
            (&mut groups_mut(&mut before[half - n * LANES..])[..n], &mut groups_mut(after)[..n]);
        for g in 0..n {
            let (even, odd) = (even[g], odd[g]);
            let (mut sums, mut differences) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                sums[l] = even[l] + odd[l];
                differences[l] = even[LANES - 1 - l] - odd[LANES - 1 - l];
            }
            (after[g], before[n - 1 - g]) = (sums, differences);
        }
    }
    for i in half / LANES * LANES..half {
        after[i] = even[i] + odd[i];
        before[half - 1 - i] = even[i] - odd[i];
    }
}
