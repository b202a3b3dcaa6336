//! Eight or sixteen f32 side by side: what the loops around the matrix products are written in.
//!
//! The compiler's own vector code for them took two thirds longer: blocks are short, and it spends them on remainders.
//! Every operation rounds as IEEE 754 says, so all instruction sets give the same bits.

use crate::format::gain::BlockGain;
use crate::lanes::{LANES, WIDE};

/// N f32 in one register, or an array where there is none.
pub(crate) trait Floats<const N: usize>: Copy {
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
pub(crate) trait UnpackSides: Floats<LANES> {
    /// Gains and step factors of eight side bytes, see [`crate::format::gain`].
    fn unpack_sides(block: BlockGain, sides: &[u8; LANES]) -> (Self, Self);
}

/// Sixteen lanes in two vectors of eight.
#[derive(Clone, Copy)]
pub(crate) struct Two<V>(V, V);

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
