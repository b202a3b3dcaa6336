//! A block's side information to numbers: side bytes and drift.

use crate::format::drift::DRIFT_HALF;
use crate::format::gain::BlockGain;
use crate::lanes::{LANES, groups_mut};
use crate::simd::floats::UnpackSides;

/// Gains and step factors of a block's tokens.
#[inline(always)]
pub(super) fn unpack_sides<V: UnpackSides>(
    block: BlockGain,
    side: &[u8],
    gains: &mut [f32],
    scales: &mut [f32],
) {
    let sides = side.as_chunks::<LANES>().0;
    let n = sides.len();
    let (gains, scales) = (&mut groups_mut(gains)[..n], &mut groups_mut(scales)[..n]);
    for g in 0..n {
        let (of_group, factors) = V::unpack_sides(block, &sides[g]);
        of_group.store(&mut gains[g]);
        factors.store(&mut scales[g]);
    }
}

/// The drift of all coefficients, in their steps; `units` and `drift` are padded with zeros to whole vectors.
#[inline(always)]
pub(super) fn unpack_drift(packed: &[u8], units: &[f32], drift: &mut [f32]) {
    let n = packed.len();
    let (low, high) = drift[..units.len()].split_at_mut(n);
    let (low_units, high_units) = units.split_at(n);
    for j in 0..n {
        low[j] = (i32::from(packed[j] & 15) - DRIFT_HALF as i32) as f32 * low_units[j];
    }
    let n = n.min(high.len());
    let (high, rest) = high.split_at_mut(n);
    let high_units = &high_units[..n];
    for j in 0..n {
        high[j] = (i32::from(packed[j] >> 4) - DRIFT_HALF as i32) as f32 * high_units[j];
    }
    rest.fill(0.0);
}
