//! [`MultiplyCodes`] for NEON: codes become 16-bit integers on the way.

use std::arch::aarch64::*;

use super::codes::QUAD;
use super::lanes::LANES;
use super::multiply_codes::{DOT_STEP, MultiplyCodes, check_columns, check_rows};
use super::multiply_neon::{Neon, Octet};
use super::tiles::for_tiles;

/// sums + the products of eight codes with lane `LANE` of four integers, in 32 bits.
#[target_feature(enable = "neon")]
#[inline]
fn add_lane_products<const LANE: i32>(
    [low, high]: Octet<int32x4_t>,
    codes: int16x8_t,
    four: int16x4_t,
) -> Octet<int32x4_t> {
    [vmlal_lane_s16::<LANE>(low, vget_low_s16(codes), four), vmlal_high_lane_s16::<LANE>(high, codes, four)]
}

/// sum + a · b, in 32 bits.
#[target_feature(enable = "neon")]
#[inline]
fn add_products(sum: int32x4_t, a: int16x8_t, b: int16x8_t) -> int32x4_t {
    vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b)
}

/// Eight codes as 16-bit integers.
#[target_feature(enable = "neon")]
#[inline]
fn widened(codes: uint8x8_t) -> int16x8_t {
    vreinterpretq_s16_u16(vmovl_u8(codes))
}

impl Neon {
    /// `ROWS` rows × `OCTETS` times eight columns from (row, column) on.
    #[target_feature(enable = "neon")]
    #[inline]
    fn quad_tile<const ROWS: usize, const OCTETS: usize>(
        a: &[i16],
        a_stride: usize,
        x: &[u8],
        out: &mut [i32],
        (row, column): (usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(column + OCTETS * LANES <= n && k <= a_stride && k % 4 == 0);
        assert!(x.len() >= k * n && a.len() >= (row + ROWS - 1) * a_stride + k);
        assert!(out.len() >= (row + ROWS) * n);
        let zero: Octet<int32x4_t> = [vdupq_n_s32(0); 2];
        let mut sums = [[zero; OCTETS]; ROWS];
        for j in (0..k).step_by(QUAD) {
            let mut codes = [[vdupq_n_s16(0); QUAD]; OCTETS];
            for v in 0..OCTETS {
                let at = j * n + QUAD * (column + v * LANES);
                // SAFETY: j·n + 4·(column + OCTETS·8) ≤ k·n ≤ x.len(), asserted above.
                let uint8x8x4_t(c0, c1, c2, c3) = unsafe { vld4_u8(x.as_ptr().add(at)) };
                codes[v] = [widened(c0), widened(c1), widened(c2), widened(c3)];
            }
            for r in 0..ROWS {
                // SAFETY: (row + r)·a_stride + j + 4 ≤ (row + ROWS − 1)·a_stride + k ≤ a.len().
                let four = unsafe { vld1_s16(a.as_ptr().add((row + r) * a_stride + j)) };
                for v in 0..OCTETS {
                    sums[r][v] = add_lane_products::<0>(sums[r][v], codes[v][0], four);
                    sums[r][v] = add_lane_products::<1>(sums[r][v], codes[v][1], four);
                    sums[r][v] = add_lane_products::<2>(sums[r][v], codes[v][2], four);
                    sums[r][v] = add_lane_products::<3>(sums[r][v], codes[v][3], four);
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
    fn code_dot_tile<const ROWS: usize, const COLUMNS: usize>(
        a: &[i16],
        b: &[u8],
        out: &mut [i32],
        (row, column): (usize, usize),
        (k, n): (usize, usize),
    ) {
        assert!(k % DOT_STEP == 0 && column + COLUMNS <= n && out.len() >= (row + ROWS) * n);
        assert!(a.len() >= (row + ROWS) * k && b.len() >= (column + COLUMNS) * k);
        let mut sums = [[vdupq_n_s32(0); COLUMNS]; ROWS];
        for t in (0..k).step_by(8) {
            let mut codes = [vdupq_n_s16(0); COLUMNS];
            for c in 0..COLUMNS {
                // SAFETY: (column + c)·k + t + 8 ≤ (column + COLUMNS)·k ≤ b.len(), as 8 divides k.
                codes[c] = widened(unsafe { vld1_u8(b.as_ptr().add((column + c) * k + t)) });
            }
            for r in 0..ROWS {
                // SAFETY: (row + r)·k + t + 8 ≤ (row + ROWS)·k ≤ a.len(), likewise.
                let factors = unsafe { vld1q_s16(a.as_ptr().add((row + r) * k + t)) };
                for c in 0..COLUMNS {
                    sums[r][c] = add_products(sums[r][c], factors, codes[c]);
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..COLUMNS {
                out[(row + r) * n + column + c] = vaddvq_s32(sums[r][c]);
            }
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn all_quads(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
        let m = check_columns(a, a_stride, x, out, shape);
        for_tiles!(quad_tile, (m, shape.1), (5, [4, 3, 2, 1]), (2, LANES), |row, column| (
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
    fn all_code_dots(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
        let m = check_rows(a, b, out, shape);
        for_tiles!(code_dot_tile, (m, shape.1), (4, [3, 2, 1]), (4, 1), |row, column| (
            a,
            b,
            out,
            (row, column),
            shape
        ));
    }
}

impl MultiplyCodes for Neon {
    #[inline(always)]
    fn order_columns(_: &mut [i16]) {}

    #[inline(always)]
    fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
        // SAFETY: every aarch64 CPU has NEON.
        unsafe { Self::all_quads(a, a_stride, x, out, shape) }
    }

    #[inline(always)]
    fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
        // SAFETY: as above.
        unsafe { Self::all_code_dots(a, b, out, shape) }
    }
}
