//! Eight f32 side by side: what the loops around the matrix products are written in.
//!
//! The compiler's own vector code for them took two thirds longer: blocks are short, and it spends them on remainders.
//! Every operation rounds as IEEE 754 says, so all instruction sets give the same bits.

use super::ROUND;
use super::lanes::{LANES, larger};
use crate::gain::BlockGain;

/// Eight f32 in one register, or an array where there is none.
pub(super) trait F32x8: Copy {
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    /// Integers, converted.
    fn load_i32(from: &[i32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    /// Rounds to the nearest integers, ties to even; magnitudes are below 2¹⁵.
    fn store_i16(self, to: &mut [i16; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// self · factor + summand, rounded once.
    fn mul_add(self, factor: Self, summand: Self) -> Self;
    /// self · factor − subtrahend, rounded once.
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self;
    fn abs(self) -> Self;
    /// `self` where it is larger, else `other`: NaN in `self` counts as less than all.
    fn larger(self, other: Self) -> Self;
    /// The last lane first.
    fn reversed(self) -> Self;
    /// The sum of all lanes: halves are added until one is left.
    fn total(self) -> f32;
    /// The largest lane.
    fn largest(self) -> f32;
    /// Gains and step factors of eight side bytes, see [`crate::gain`].
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self);
}

/// Applies `$value` to each lane `$l`.
macro_rules! each_lane {
    ($l:ident => $value:expr) => {{
        let mut lanes = [0.0f32; LANES];
        for $l in 0..LANES {
            lanes[$l] = $value;
        }
        lanes
    }};
}

impl F32x8 for [f32; LANES] {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        *from
    }

    #[inline(always)]
    fn load_i32(from: &[i32; LANES]) -> Self {
        each_lane!(l => from[l] as f32)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self;
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; LANES]) {
        for l in 0..LANES {
            to[l] = (self[l] + ROUND).to_bits() as i16;
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        each_lane!(l => self[l] + other[l])
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        each_lane!(l => self[l] - other[l])
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        each_lane!(l => self[l] * other[l])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        each_lane!(l => self[l].mul_add(factor[l], summand[l]))
    }

    #[inline(always)]
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
        each_lane!(l => self[l].mul_add(factor[l], -subtrahend[l]))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        each_lane!(l => self[l].abs())
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        each_lane!(l => larger(self[l], other[l]))
    }

    #[inline(always)]
    fn reversed(self) -> Self {
        each_lane!(l => self[LANES - 1 - l])
    }

    #[inline(always)]
    fn total(self) -> f32 {
        super::lanes::total(self)
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        super::lanes::largest(self)
    }

    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        let (mut gains, mut scales) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            (gains[l], scales[l]) = block.unpack_side(sides[l]);
        }
        (gains, scales)
    }
}

#[cfg(test)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tests {
    use super::*;
    use crate::kernels::{Isa, available_isas};
    #[cfg(target_arch = "aarch64")]
    use std::arch::aarch64::float32x4x2_t as Registers;
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::__m256 as Registers;

    #[cfg(target_arch = "x86_64")]
    const ISA: Isa = Isa::Avx2;
    #[cfg(target_arch = "aarch64")]
    const ISA: Isa = Isa::Neon;

    /// Every operation on a few inputs, as bits.
    #[inline(always)]
    fn all_operations<V: F32x8>(
        a: &[f32; LANES],
        b: &[f32; LANES],
        (block, sides): (BlockGain, &[u8; LANES]),
    ) -> Vec<u32> {
        let (x, y) = (V::load(a), V::load(b));
        let (gains, scales) = V::unpack_sides(block, sides);
        let integers = a.map(|v| (v * 1e4) as i32);
        let vectors = [
            V::splat(a[3]),
            V::load_i32(&integers),
            x.add(y),
            x.sub(y),
            x.mul(y),
            x.mul_add(y, x),
            x.mul_sub(y, x),
            x.abs(),
            x.larger(y),
            x.reversed(),
            gains,
            scales,
        ];
        let mut bits = vec![x.total().to_bits(), x.largest().to_bits()];
        for vector in vectors {
            let mut lanes = [0.0; LANES];
            vector.store(&mut lanes);
            bits.extend(lanes.map(f32::to_bits));
        }
        let mut rounded = [0i16; LANES];
        x.store_i16(&mut rounded);
        bits.extend(rounded.map(|v| v as u32));
        bits
    }

    /// Where registers must do as arrays do with NaN and with zeros of both signs.
    #[inline(always)]
    fn selections<V: F32x8>(a: &[f32; LANES], b: &[f32; LANES]) -> Vec<u32> {
        let (x, y) = (V::load(a), V::load(b));
        let mut bits = vec![x.larger(y).largest().to_bits(), y.larger(x).largest().to_bits()];
        for vector in [x.larger(y), y.larger(x), x.mul_sub(y, x.mul(y)), y.mul_sub(y, y)] {
            let mut lanes = [0.0; LANES];
            vector.store(&mut lanes);
            // Of NaN, bits are nobody's business.
            bits.extend(lanes.map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }));
        }
        bits
    }

    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    fn in_registers(a: &[f32; LANES], b: &[f32; LANES], sides: (BlockGain, &[u8; LANES])) -> Vec<u32> {
        all_operations::<Registers>(a, b, sides)
    }

    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    fn selections_in_registers(a: &[f32; LANES], b: &[f32; LANES]) -> Vec<u32> {
        selections::<Registers>(a, b)
    }

    #[test]
    fn registers_select_as_arrays_do() {
        if !available_isas().contains(&ISA) {
            return;
        }
        let values = [0.0, -0.0, f32::NAN, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, 1.0];
        for turn in 0..LANES {
            let turned = std::array::from_fn(|l| values[(l + turn) % LANES]);
            // SAFETY: the CPU has the features of `ISA`, asked above.
            let registers = unsafe { selections_in_registers(&values, &turned) };
            assert_eq!(registers, selections::<[f32; LANES]>(&values, &turned), "turned by {turn}");
        }
    }

    #[test]
    fn registers_agree_with_arrays_to_the_bit() {
        if !available_isas().contains(&ISA) {
            return;
        }
        for seed in 0..4096u32 {
            let number = |i: usize| {
                let hash = (seed * 8 + i as u32).wrapping_mul(0x9e37_79b9).rotate_left(13);
                // Halves among them, where rounding must go to the even neighbour.
                (hash % 60_001) as f32 * 0.5 - 15_000.0 + if seed % 2 == 0 { 0.0 } else { 0.3 }
            };
            let a: [f32; LANES] = std::array::from_fn(number);
            let b: [f32; LANES] = std::array::from_fn(|i| number(i + 40_000));
            // All heads, and all side bytes many times.
            let block = BlockGain::unpack((seed * 16 + seed % 16) as u16);
            let sides = std::array::from_fn(|i| (seed / 3 * 8 + i as u32) as u8);
            // SAFETY: the CPU has the features of `ISA`, asked above.
            let registers = unsafe { in_registers(&a, &b, (block, &sides)) };
            assert_eq!(registers, all_operations::<[f32; LANES]>(&a, &b, (block, &sides)), "seed {seed}");
        }
    }
}
