//! Products in intrinsics against plain loops.

use crate::simd::isa::*;
use crate::simd::multiply::Multiply;
use crate::simd::multiply_codes::MultiplyCodes;

/// Integers of up to ±`largest`, the extremes among them.
fn integers(n: usize, largest: i32, seed: u32) -> Vec<i16> {
    (0..n as u32)
        .map(|i| match (i * 8 + seed).wrapping_mul(0x9e37_79b9).rotate_left(13) {
            hash if hash % 5 == 0 => largest as i16,
            hash if hash % 5 == 1 => -largest as i16,
            hash => (hash as i32 % largest) as i16,
        })
        .collect()
}

fn floats(n: usize, seed: u32) -> Vec<f32> {
    integers(n, 32_700, seed).into_iter().map(|v| f32::from(v) * 0.37).collect()
}

/// Codes, the largest among them.
fn codes(n: usize, seed: u32) -> Vec<u8> {
    integers(n, 255, seed).into_iter().map(|v| v.unsigned_abs() as u8).collect()
}

/// Every height and width of tiles, and some more rows and columns than asked for.
fn agrees_with_portable<M: Multiply>(name: &str) {
    for m in (1..=9).chain([17]) {
        for (k, n) in [(2, 8), (32, 8), (64, 16), (96, 24), (64, 40), (32, 64)] {
            // No sum may exceed 32 bits, as the callers see to it.
            let largest = (f64::from(i32::MAX) / k as f64).sqrt() as i32;
            let (stride, case) = (k + 4, format!("{name} m={m} k={k} n={n}"));
            let (a, x) = (integers(m * stride, largest, 1), integers(k * n, largest, 2));
            let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
            M::multiply_i16(&a, stride, &x, &mut ours, (k, n));
            Portable::multiply_i16(&a, stride, &x, &mut portable, (k, n));
            assert_eq!(ours, portable, "multiply_i16 {case}");
        }
        for (k, n) in [(4, 8), (32, 8), (64, 16), (92, 24), (64, 40), (36, 64)] {
            let (stride, case) = ((k + 4usize).next_multiple_of(8), format!("{name} m={m} k={k} n={n}"));
            let (mut a, x) = (integers(m * stride, 32_700, 1), codes(k * n, 2));
            let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
            Portable::multiply_codes(&a, stride, &x, &mut portable, (k, n));
            M::order_columns(&mut a);
            M::multiply_codes(&a, stride, &x, &mut ours, (k, n));
            assert_eq!(ours, portable, "multiply_codes {case}");
        }
        for (k, n) in [(64, 1), (64, 2), (128, 3), (192, 4), (64, 7), (1024, 5)] {
            // Again no sum may exceed 32 bits.
            let largest = 32_700.min(8_400_000 / k as i32);
            let case = format!("{name} m={m} k={k} n={n}");
            let (a, b) = (integers(m * k, largest, 5), codes(n * k, 6));
            let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
            M::dot_codes(&a, &b, &mut ours, (k, n));
            Portable::dot_codes(&a, &b, &mut portable, (k, n));
            assert_eq!(ours, portable, "dot_codes {case}");
        }
        // Odd k among them: of the drift, k is the number of blocks.
        for (k, n) in [(1, 8), (3, 40), (32, 8), (64, 16), (96, 24), (64, 40), (32, 64)] {
            let case = format!("{name} m={m} k={k} n={n}");
            let (a, x) = (floats(m * k, 3), floats(k * n, 4));
            let [mut ours, mut portable] = [(); 2].map(|()| vec![7.0; m * n]);
            M::multiply(&a, &x, &mut ours, (k, n));
            Portable::multiply(&a, &x, &mut portable, (k, n));
            assert_eq!(ours, portable, "multiply {case}");
        }
        for (k, n) in [(32, 1), (64, 2), (32, 3), (96, 4), (64, 7), (8, 5), (40, 6)] {
            let case = format!("{name} m={m} k={k} n={n}");
            let (a, b) = (floats(m * k, 7), floats(n * k, 8));
            let [mut ours, mut portable] = [(); 2].map(|()| vec![7.0; m * n]);
            M::dot(&a, &b, &mut ours, (k, n));
            Portable::dot(&a, &b, &mut portable, (k, n));
            // The order of summation is free: an error of a few units in the last place of Σ |a|·|b|.
            let bound = 1e-6 * k as f32 * 1.5e8;
            for (ours, portable) in ours.iter().zip(&portable) {
                assert!((ours - portable).abs() <= bound, "dot {case}: {ours} for {portable}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_portable_text() {
    for isa in available_isas() {
        match isa {
            Isa::Portable => {}
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => agrees_with_portable::<Avx2>(isa.name()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => agrees_with_portable::<Avx512>(isa.name()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => agrees_with_portable::<Avx512Vnni>(isa.name()),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => agrees_with_portable::<Neon>(isa.name()),
        }
    }
}
