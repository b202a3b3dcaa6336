//! Lanes: values that are worked on side by side, and what is done with arrays of them.

/// Values that kernels work on together: every block length is a multiple, and eight f32 fill an AVX2 register.
pub(crate) const LANES: usize = 8;
/// Values of the widest registers, those of AVX-512: tables are padded to them.
pub(crate) const WIDE: usize = 16;

/// Adding 1.5·2²³ rounds a value below 2²² to an integer and leaves it in the low bits of the mantissa.
pub(crate) const ROUND: f32 = 12_582_912.0;

pub(crate) type Lanes = [f32; LANES];

/// Eight values from `at` on.
#[inline(always)]
pub(crate) fn load(values: &[f32], at: usize) -> Lanes {
    values[at..at + LANES].try_into().expect("a slice of LANES values")
}

/// Whole groups of N values; what is left over is the caller's.
#[inline(always)]
pub(crate) fn groups<T, const N: usize>(values: &[T]) -> &[[T; N]] {
    values.as_chunks().0
}

/// As [`groups`], to be written.
#[inline(always)]
pub(crate) fn groups_mut<T, const N: usize>(values: &mut [T]) -> &mut [[T; N]] {
    values.as_chunks_mut().0
}

/// The sum of all lanes; halves are added, so that no addition waits for more than three others.
#[inline(always)]
pub(crate) fn total<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest lane; NaN counts as less than all.
#[inline(always)]
pub(crate) fn largest<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = larger(lanes[l + half], lanes[l]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `a` if it is larger, else `b`: one instruction, unlike [`f32::max`].
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}
