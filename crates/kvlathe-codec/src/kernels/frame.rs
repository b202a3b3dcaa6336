//! A block's frame: vectors and queries turned to it, and what the mean of its keys contributes to scores.

use crate::lanes::{LANES, WIDE, groups, groups_mut};
use crate::simd::floats::Floats;
use crate::simd::multiply::{Multiply, on_widest};
use crate::transform::queries::Queries;
use crate::transform::query_tables::MeanTables;
use crate::transform::rope::Rotation;

/// Turns the block's frame vectors `x`, component-major with `n` tokens.
#[inline(always)]
pub(crate) fn rotate<M: Multiply>(rotation: &Rotation, x: &mut [f32], n: usize) {
    rotation.apply_component_major(x, n);
}
/// Turns all queries to a block's frame: `turned` receives them in integers, `even` and `odd` their products with the
/// mean. `cos` and `sin` are the frame's rotation, padded to whole vectors; empty where keys have no RoPE.
#[inline(always)]
pub(super) fn turn<V: Floats<WIDE>>(
    queries: &Queries,
    (cos, sin): (&[f32], &[f32]),
    turned: &mut [i16],
    even: &mut [f32],
    odd: &mut [f32],
) {
    let (n_pairs, places) = (cos.len() / WIDE, queries.n_places / WIDE);
    let (cos, sin) = (&groups(cos)[..n_pairs], &groups(sin)[..n_pairs]);
    for q in 0..queries.len() {
        let from = &groups(&queries.scaled)[q * places..(q + 1) * places];
        let to = &mut groups_mut(turned)[q * places..(q + 1) * places];
        let pairs = q * n_pairs..(q + 1) * n_pairs;
        let from_even = &groups(&queries.mean_even)[pairs.clone()];
        let from_odd = &groups(&queries.mean_odd)[pairs.clone()];
        let to_even = &mut groups_mut(even)[pairs.clone()];
        let to_odd = &mut groups_mut(odd)[pairs];
        for g in 0..n_pairs {
            let (cos, sin) = (V::load(&cos[g]), V::load(&sin[g]));
            let (a, b) = rotated((V::load(&from[g]), V::load(&from[n_pairs + g])), cos, sin);
            a.store_i16(&mut to[g]);
            b.store_i16(&mut to[n_pairs + g]);
            let (a, b) = rotated((V::load(&from_even[g]), V::load(&from_odd[g])), cos, sin);
            a.store(&mut to_even[g]);
            b.store(&mut to_odd[g]);
        }
        for g in 2 * n_pairs..places {
            V::load(&from[g]).store_i16(&mut to[g]);
        }
    }
}

/// (a·cos − b·sin, b·cos + a·sin)
#[inline(always)]
fn rotated<V: Floats<WIDE>>((a, b): (V, V), cos: V, sin: V) -> (V, V) {
    (a.mul_sub(cos, b.mul(sin)), b.mul_add(cos, a.mul(sin)))
}

/// `scores[q, t]` = q·R(δ)·μ, from the `even` and `odd` products of [`turn`]; see [`MeanTables`] for the symmetry.
///
/// `parts` holds at least `2 · n_queries · width` values.
#[inline(always)]
pub(super) fn score_mean<M: Multiply>(
    tables: &MeanTables,
    queries: &Queries,
    (even, odd): (&[f32], &[f32]),
    parts: &mut [f32],
    scores: &mut [f32],
    n: usize,
) {
    let width = tables.width;
    let (even_scores, odd_scores) = parts.split_at_mut(queries.len() * width);
    let odd_scores = &mut odd_scores[..queries.len() * width];
    M::multiply(even, &tables.even, even_scores, (tables.n_pairs, width));
    M::multiply(odd, &tables.odd, odd_scores, (tables.n_pairs, width));
    for q in 0..queries.len() {
        let run = q * width..(q + 1) * width;
        let (even, odd) = (&even_scores[run.clone()], &odd_scores[run]);
        let (rest, scores) = (queries.mean_rest[q], &mut scores[q * n..(q + 1) * n]);
        on_widest!(n / 2, join_halves::<M>(even, odd, rest, scores));
    }
}

/// Scores of the tokens after a block's middle are rest + even + odd, those before it, backwards, rest + even − odd.
#[inline(always)]
fn join_halves<V: Floats<N>, const N: usize>(even: &[f32], odd: &[f32], rest: f32, scores: &mut [f32]) {
    let half = scores.len() / 2;
    let (before, after) = scores.split_at_mut(half);
    let n = half / N;
    {
        let rest = V::splat(rest);
        let (even, odd) = (&groups(even)[..n], &groups(odd)[..n]);
        let before = &mut groups_mut(&mut before[half - n * N..])[..n];
        let after = &mut groups_mut(after)[..n];
        for g in 0..n {
            let (even, odd) = (rest.add(V::load(&even[g])), V::load(&odd[g]));
            even.add(odd).store(&mut after[g]);
            even.sub(odd).reversed().store(&mut before[n - 1 - g]);
        }
    }
    for i in n * N..half {
        after[i] = rest + even[i] + odd[i];
        before[half - 1 - i] = rest + even[i] - odd[i];
    }
}
