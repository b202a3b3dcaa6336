//! [`Multiply`] for NEON: tiles of rows × columns whose sums stay in registers.
//!
//! A register has four numbers, and there are 32: a tile of six rows and twice eight columns takes 24 for its sums.

use std::arch::aarch64::*;

use super::floats::Two;
use super::lanes::LANES;
use super::multiply::{Multiply, check_dot, check_pairs, check_shape};
use super::tiles::for_tiles;

/// NEON, which every aarch64 has.
pub(super) struct Neon;

/// Eight numbers. Not `float32x4x2_t`: storing one takes neighbouring registers, for which the compiler moves sums to the
/// stack in the middle of a tile.
pub(super) type Octet<T> = [T; 2];

/// sums + pair[0] · the numbers of even place + pair[1] · those between, in 32 bits.
#[target_feature(enable = "neon")]
#[inline]
fn add_pair_products(
    [low, high]: Octet<int32x4_t>,
    int16x8x2_t(even, odd): int16x8x2_t,
    pair: int16x4_t,
) -> Octet<int32x4_t> {
    let low = vmlal_lane_s16::<0>(low, vget_low_s16(even), pair);
    let high = vmlal_high_lane_s16::<0>(high, even, pair);
    [vmlal_lane_s16::<1>(low, vget_low_s16(odd), pair), vmlal_high_lane_s16::<1>(high, odd, pair)]
}

impl Neon {
    /// `ROWS` rows × `OCTETS` times eight columns from (row, column) on.
    #[target_feature(enable = "neon")]
    #[inline]
    fn tile<const ROWS: usize, const OCTETS: usize>(
        a: &[f32],
        x: &[f32],
        out: &mut [f32],
        (row, column): (usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(column + OCTETS * LANES <= n);
        assert!(x.len() >= k * n && a.len() >= (row + ROWS) * k && out.len() >= (row + ROWS) * n);
        let zero: Octet<float32x4_t> = [vdupq_n_f32(0.0); 2];
        let mut sums = [[zero; OCTETS]; ROWS];
        for j in 0..k {
            let mut values = [zero; OCTETS];
            for v in 0..OCTETS {
                // SAFETY: j·n + column + OCTETS·8 ≤ k·n ≤ x.len(), asserted above.
                values[v] = unsafe {
                    let from = x.as_ptr().add(j * n + column + v * LANES);
                    [vld1q_f32(from), vld1q_f32(from.add(4))]
                };
            }
            for r in 0..ROWS {
                // SAFETY: (row + r)·k + j < (row + ROWS)·k ≤ a.len(), asserted above.
                let factor = unsafe { *a.get_unchecked((row + r) * k + j) };
                for v in 0..OCTETS {
                    for half in 0..2 {
                        sums[r][v][half] = vfmaq_n_f32(sums[r][v][half], values[v][half], factor);
                    }
                }
            }
        }
        for r in 0..ROWS {
            for v in 0..OCTETS {
                // SAFETY: (row + r)·n + column + OCTETS·8 ≤ (row + ROWS)·n ≤ out.len(), asserted above.
                unsafe {
                    let to = out.as_mut_ptr().add((row + r) * n + column + v * LANES);
                    vst1q_f32(to, sums[r][v][0]);
                    vst1q_f32(to.add(4), sums[r][v][1]);
                }
            }
        }
    }

    /// As `tile`, for 16-bit integers whose rows of `x` lie interleaved in pairs.
    #[target_feature(enable = "neon")]
    #[inline]
    fn pair_tile<const ROWS: usize, const OCTETS: usize>(
        a: &[i16],
        a_stride: usize,
        x: &[i16],
        out: &mut [i32],
        (row, column): (usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(column + OCTETS * LANES <= n && k <= a_stride && k % 2 == 0);
        assert!(x.len() >= k * n && a.len() >= (row + ROWS - 1) * a_stride + k);
        assert!(out.len() >= (row + ROWS) * n);
        let zero: Octet<int32x4_t> = [vdupq_n_s32(0); 2];
        let mut sums = [[zero; OCTETS]; ROWS];
        for j in 0..k / 2 {
            let mut values = [int16x8x2_t(vdupq_n_s16(0), vdupq_n_s16(0)); OCTETS];
            for v in 0..OCTETS {
                // SAFETY: 2·(j·n + column + OCTETS·8) ≤ k·n ≤ x.len(), asserted above.
                values[v] = unsafe { vld2q_s16(x.as_ptr().add(2 * (j * n + column + v * LANES))) };
            }
            for r in 0..ROWS {
                let at = (row + r) * a_stride + 2 * j;
                // SAFETY: (row + r)·a_stride + 2j + 1 < (row + ROWS − 1)·a_stride + k ≤ a.len().
                let pair = unsafe { a.as_ptr().add(at).cast::<i32>().read_unaligned() };
                let pair = vreinterpret_s16_s32(vdup_n_s32(pair));
                for v in 0..OCTETS {
                    sums[r][v] = add_pair_products(sums[r][v], values[v], pair);
                }
            }
        }
        for r in 0..ROWS {
            for v in 0..OCTETS {
                // SAFETY: (row + r)·n + column + OCTETS·8 ≤ (row + ROWS)·n ≤ out.len(), asserted above.
                unsafe {
                    let to = out.as_mut_ptr().add((row + r) * n + column + v * LANES);
                    vst1q_s32(to, sums[r][v][0]);
                    vst1q_s32(to.add(4), sums[r][v][1]);
                }
            }
        }
    }

    /// Dot products of `ROWS` rows of `a` with `COLUMNS` rows of `b`.
    #[target_feature(enable = "neon")]
    #[inline]
    fn dot_tile<const ROWS: usize, const COLUMNS: usize>(
        a: &[f32],
        b: &[f32],
        out: &mut [f32],
        (row, column): (usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(k % 4 == 0 && column + COLUMNS <= n && out.len() >= (row + ROWS) * n);
        assert!(a.len() >= (row + ROWS) * k && b.len() >= (column + COLUMNS) * k);
        let mut sums = [[vdupq_n_f32(0.0); COLUMNS]; ROWS];
        for t in (0..k).step_by(4) {
            let mut values = [vdupq_n_f32(0.0); COLUMNS];
            for c in 0..COLUMNS {
                // SAFETY: (column + c)·k + t + 4 ≤ (column + COLUMNS)·k ≤ b.len(), as 4 divides k.
                values[c] = unsafe { vld1q_f32(b.as_ptr().add((column + c) * k + t)) };
            }
            for r in 0..ROWS {
                // SAFETY: (row + r)·k + t + 4 ≤ (row + ROWS)·k ≤ a.len(), likewise.
                let factors = unsafe { vld1q_f32(a.as_ptr().add((row + r) * k + t)) };
                for c in 0..COLUMNS {
                    sums[r][c] = vfmaq_f32(sums[r][c], factors, values[c]);
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..COLUMNS {
                out[(row + r) * n + column + c] = vaddvq_f32(sums[r][c]);
            }
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn all(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
        let m = check_shape(a, x, out, shape);
        for_tiles!(tile, (m, shape.1), (6, [5, 4, 3, 2, 1]), (2, LANES), |row, column| (
            a,
            x,
            out,
            (row, column),
            shape
        ));
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn all_pairs(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize)) {
        let m = check_pairs(a, a_stride, x, out, shape);
        for_tiles!(pair_tile, (m, shape.1), (6, [5, 4, 3, 2, 1]), (2, LANES), |row, column| (
            a,
            a_stride,
            x,
            out,
            (row, column),
            shape
        ));
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn all_dots(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
        let m = check_dot(a, b, out, shape);
        for_tiles!(dot_tile, (m, shape.1), (4, [3, 2, 1]), (4, 1), |row, column| (
            a,
            b,
            out,
            (row, column),
            shape
        ));
    }
}

impl Multiply for Neon {
    type F32x8 = float32x4x2_t;
    type F32x16 = Two<float32x4x2_t>;

    #[inline(always)]
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
        // SAFETY: the marker is named only inside functions that enable NEON.
        unsafe { Self::all(a, x, out, shape) }
    }

    #[inline(always)]
    fn dot(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
        // SAFETY: as above.
        unsafe { Self::all_dots(a, b, out, shape) }
    }

    #[inline(always)]
    fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize)) {
        // SAFETY: as above.
        unsafe { Self::all_pairs(a, a_stride, x, out, shape) }
    }
}
