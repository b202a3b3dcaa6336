//! Eight or sixteen f32 side by side: what the loops around the matrix products are written in.
//!
//! The compiler's own vector code for them took two thirds longer: blocks are short, and it spends them on remainders.
//! Every operation rounds as IEEE 754 says, so all instruction sets give the same bits.

use super::ROUND;
use super::lanes::{LANES, WIDE, larger};
use crate::gain::BlockGain;

/// N f32 in one register, or an array where there is none.
pub(super) trait Floats<const N: usize>: Copy {
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; N]) -> Self;
    /// Integers, converted.
    fn load_i32(from: &[i32; N]) -> Self;
    fn store(self, to: &mut [f32; N]);
    /// Rounds to the nearest integers, ties to even; magnitudes are below 2¹⁵.
    fn store_i16(self, to: &mut [i16; N]);
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
}

/// What else eight lanes can do.
pub(super) trait UnpackSides: Floats<LANES> {
    /// Gains and step factors of eight side bytes, see [`crate::gain`].
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self);
}

/// Applies `$value` to each lane `$l`.
macro_rules! each_lane {
    ($l:ident => $value:expr) => {{
        let mut lanes = [0.0f32; N];
        for $l in 0..N {
            lanes[$l] = $value;
        }
        lanes
    }};
}

impl<const N: usize> Floats<N> for [f32; N] {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; N]
    }

    #[inline(always)]
    fn load(from: &[f32; N]) -> Self {
        *from
    }

    #[inline(always)]
    fn load_i32(from: &[i32; N]) -> Self {
        each_lane!(l => from[l] as f32)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; N]) {
        *to = self;
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; N]) {
        for l in 0..N {
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
        each_lane!(l => self[N - 1 - l])
    }

    #[inline(always)]
    fn total(self) -> f32 {
        super::lanes::total(self)
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        super::lanes::largest(self)
    }
}

impl UnpackSides for [f32; LANES] {
    #[inline(always)]
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self) {
        let (mut gains, mut scales) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            (gains[l], scales[l]) = block.unpack_side(sides[l]);
        }
        (gains, scales)
    }
}

/// Sixteen lanes in two vectors of eight.
#[derive(Clone, Copy)]
pub(super) struct Two<V>(V, V);

/// Two groups of eight.
#[inline(always)]
fn halves<T>(values: &[T; WIDE]) -> (&[T; LANES], &[T; LANES]) {
    let (halves, _) = values.as_chunks();
    (&halves[0], &halves[1])
}

#[inline(always)]
fn halves_mut<T>(values: &mut [T; WIDE]) -> (&mut [T; LANES], &mut [T; LANES]) {
    let [first, second] = values.as_chunks_mut().0 else { unreachable!("sixteen are two times eight") };
    (first, second)
}

impl<V: Floats<LANES>> Floats<WIDE> for Two<V> {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(V::splat(value), V::splat(value))
    }

    #[inline(always)]
    fn load(from: &[f32; WIDE]) -> Self {
        let (first, second) = halves(from);
        Self(V::load(first), V::load(second))
    }

    #[inline(always)]
    fn load_i32(from: &[i32; WIDE]) -> Self {
        let (first, second) = halves(from);
        Self(V::load_i32(first), V::load_i32(second))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; WIDE]) {
        let (first, second) = halves_mut(to);
        self.0.store(first);
        self.1.store(second);
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; WIDE]) {
        let (first, second) = halves_mut(to);
        self.0.store_i16(first);
        self.1.store_i16(second);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0.add(other.0), self.1.add(other.1))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0.sub(other.0), self.1.sub(other.1))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0.mul(other.0), self.1.mul(other.1))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        Self(self.0.mul_add(factor.0, summand.0), self.1.mul_add(factor.1, summand.1))
    }

    #[inline(always)]
    fn mul_sub(self, factor: Self, subtrahend: Self) -> Self {
        Self(self.0.mul_sub(factor.0, subtrahend.0), self.1.mul_sub(factor.1, subtrahend.1))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.abs(), self.1.abs())
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        Self(self.0.larger(other.0), self.1.larger(other.1))
    }

    #[inline(always)]
    fn reversed(self) -> Self {
        Self(self.1.reversed(), self.0.reversed())
    }

    #[inline(always)]
    fn total(self) -> f32 {
        self.0.add(self.1).total()
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.1.larger(self.0).largest()
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
    use std::arch::x86_64::__m512;

    #[cfg(target_arch = "x86_64")]
    const ISA: Isa = Isa::Avx2;
    #[cfg(target_arch = "aarch64")]
    const ISA: Isa = Isa::Neon;

    fn bits_of<V: Floats<N>, const N: usize>(vector: V) -> [u32; N] {
        let mut lanes = [0.0; N];
        vector.store(&mut lanes);
        lanes.map(f32::to_bits)
    }

    /// Every operation on a few inputs, as bits.
    #[inline(always)]
    fn all_operations<V: Floats<N>, const N: usize>(a: &[f32; N], b: &[f32; N]) -> Vec<u32> {
        let (x, y) = (V::load(a), V::load(b));
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
        ];
        let mut bits = vec![x.total().to_bits(), x.largest().to_bits()];
        bits.extend(vectors.into_iter().flat_map(bits_of));
        let mut rounded = [0i16; N];
        x.store_i16(&mut rounded);
        bits.extend(rounded.map(|v| v as u32));
        bits
    }

    /// Where registers must do as arrays do with NaN and with zeros of both signs.
    #[inline(always)]
    fn selections<V: Floats<N>, const N: usize>(a: &[f32; N], b: &[f32; N]) -> Vec<u32> {
        let (x, y) = (V::load(a), V::load(b));
        let mut bits = vec![x.larger(y).largest().to_bits(), y.larger(x).largest().to_bits()];
        for vector in [x.larger(y), y.larger(x), x.mul_sub(y, x.mul(y)), y.mul_sub(y, y)] {
            // Of NaN, bits are nobody's business.
            bits.extend(bits_of(vector).map(|v| if f32::from_bits(v).is_nan() { u32::MAX } else { v }));
        }
        bits
    }

    fn sides_of<V: UnpackSides>(block: BlockGain, sides: &[u8; LANES]) -> [[u32; LANES]; 2] {
        let (gains, scales) = V::unpack_sides(block, sides);
        [bits_of(gains), bits_of(scales)]
    }

    /// Asserts that a vector type does what arrays do, over many inputs.
    #[inline(always)]
    fn assert_like_arrays<V: Floats<N>, const N: usize>() {
        let values = [0.0, -0.0, f32::NAN, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, 1.0];
        let specials = std::array::from_fn(|l| values[l % 8]);
        for turn in 0..N {
            let turned = std::array::from_fn(|l| values[(l + l / 8 + turn) % 8]);
            let registers = selections::<V, N>(&specials, &turned);
            assert_eq!(registers, selections::<[f32; N], N>(&specials, &turned), "turned by {turn}");
        }
        for seed in 0..4096u32 {
            let number = |i: usize| {
                let hash = (seed * 8 + i as u32).wrapping_mul(0x9e37_79b9).rotate_left(13);
                // Halves among them, where rounding must go to the even neighbour.
                (hash % 60_001) as f32 * 0.5 - 15_000.0 + if seed % 2 == 0 { 0.0 } else { 0.3 }
            };
            let a: [f32; N] = std::array::from_fn(number);
            let b: [f32; N] = std::array::from_fn(|i| number(i + 40_000));
            let registers = all_operations::<V, N>(&a, &b);
            assert_eq!(registers, all_operations::<[f32; N], N>(&a, &b), "seed {seed}");
        }
    }

    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma"))]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    fn check_registers() {
        assert_like_arrays::<Registers, LANES>();
        assert_like_arrays::<Two<Registers>, WIDE>();
        for seed in 0..4096u32 {
            // All heads, and all side bytes many times.
            let block = BlockGain::unpack((seed * 16 + seed % 16) as u16);
            let sides = std::array::from_fn(|i| (seed / 3 * 8 + i as u32) as u8);
            let registers = sides_of::<Registers>(block, &sides);
            assert_eq!(registers, sides_of::<[f32; LANES]>(block, &sides), "seed {seed}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    fn check_wide_registers() {
        assert_like_arrays::<__m512, WIDE>();
    }

    #[test]
    fn registers_agree_with_arrays_to_the_bit() {
        if available_isas().contains(&ISA) {
            // SAFETY: the CPU has the features of `ISA`, asked above.
            unsafe { check_registers() };
        }
        #[cfg(target_arch = "x86_64")]
        if available_isas().contains(&Isa::Avx512) {
            // SAFETY: the CPU has the features of AVX-512, asked above.
            unsafe { check_wide_registers() };
        }
    }
}
