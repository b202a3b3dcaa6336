//! Registers against arrays.

use crate::format::gain::BlockGain;
use crate::lanes::{LANES, WIDE};
use crate::simd::floats::{Floats, Two, UnpackSides};
use crate::simd::isa::{Isa, available_isas};
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
