//! The products of integers with codes, once these are bytes.

/// Elements that [`MultiplyCodes::dot_codes`] takes at a time.
pub(super) const DOT_STEP: usize = 64;

/// Products with codes on one instruction set; integers are exact, so all give the same bits.
pub(super) trait MultiplyCodes {
    /// Puts rows of integers into the order that this set's [`MultiplyCodes::multiply_codes`] wants them in; their length is a
    /// multiple of eight.
    fn order_columns(a: &mut [i16]);

    /// out[m, n] = a[m, k] · x, with x as `[k/4, n, 4]`: four rows of codes lie interleaved. The rows of `a`, ordered, begin
    /// `a_stride`, a multiple of eight, apart; k is a multiple of four, n one of eight.
    fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize));

    /// out[m, n] = a[m, k] · b[n, k]ᵀ; `shape` is (k, n), k a multiple of [`DOT_STEP`].
    fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize));
}

/// Panics unless the slices have the lengths that [`MultiplyCodes::multiply_codes`] asks for: the bounds that unchecked
/// loads rely on. Gives m.
#[inline(always)]
pub(super) fn check_columns(
    a: &[i16],
    a_stride: usize,
    x: &[u8],
    out: &[i32],
    (k, n): (usize, usize),
) -> usize {
    assert!(n > 0 && n.is_multiple_of(8) && out.len().is_multiple_of(n));
    assert!(k.is_multiple_of(4) && k <= a_stride && a_stride.is_multiple_of(8));
    let m = out.len() / n;
    assert!(a.len() >= m * a_stride && x.len() >= k * n);
    m
}

/// As [`check_columns`], for [`MultiplyCodes::dot_codes`].
#[inline(always)]
pub(super) fn check_rows(a: &[i16], b: &[u8], out: &[i32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && out.len().is_multiple_of(n) && k.is_multiple_of(DOT_STEP));
    let m = out.len() / n;
    assert!(a.len() >= m * k && b.len() >= n * k);
    m
}

impl MultiplyCodes for super::multiply::Portable {
    #[inline(always)]
    fn order_columns(_: &mut [i16]) {}

    #[inline(always)]
    fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
        let m = check_columns(a, a_stride, x, out, (k, n));
        for i in 0..m {
            let sums = &mut out[i * n..(i + 1) * n];
            sums.fill(0);
            for j in (0..k).step_by(4) {
                let a = &a[i * a_stride + j..][..4];
                for (sum, codes) in sums.iter_mut().zip(x[j * n..(j + 4) * n].chunks_exact(4)) {
                    for r in 0..4 {
                        *sum += i32::from(a[r]) * i32::from(codes[r]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
        let m = check_rows(a, b, out, (k, n));
        for i in 0..m {
            for j in 0..n {
                let (a, b) = (&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
                let mut sum = 0;
                for t in 0..k {
                    sum += i32::from(a[t]) * i32::from(b[t]);
                }
                out[i * n + j] = sum;
            }
        }
    }
}

#[cfg(test)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tests {
    use super::super::multiply::Portable;
    use super::*;
    use crate::kernels::{Isa, available_isas};

    /// What integers in 16 bits are scaled to.
    const LARGEST: f32 = 32_700.0;

    fn hash(i: usize, seed: u32) -> u32 {
        (i as u32 * 8 + seed).wrapping_mul(0x9e37_79b9).rotate_left(13)
    }

    /// Integers of up to ±`largest`, the extremes among them.
    fn integers(n: usize, largest: i32, seed: u32) -> Vec<i16> {
        (0..n)
            .map(|i| match hash(i, seed) {
                hash if hash % 5 == 0 => largest as i16,
                hash if hash % 5 == 1 => -largest as i16,
                hash => (hash as i32 % largest) as i16,
            })
            .collect()
    }

    /// Codes, the largest among them.
    fn codes(n: usize, seed: u32) -> Vec<u8> {
        (0..n)
            .map(|i| match hash(i, seed) {
                hash if hash % 3 == 0 => 255,
                hash => (hash >> 8) as u8,
            })
            .collect()
    }

    /// Every height and width of tiles, and some more rows and columns than asked for.
    fn agrees_with_portable<M: MultiplyCodes>(name: &str) {
        for m in (1..=9).chain([17]) {
            for (k, n) in [(4, 8), (32, 8), (64, 16), (92, 24), (64, 40), (36, 64)] {
                let (stride, case) = ((k + 4usize).next_multiple_of(8), format!("{name} m={m} k={k} n={n}"));
                let (a, x) = (integers(m * stride, LARGEST as i32, 1), codes(k * n, 2));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
                Portable::multiply_codes(&a, stride, &x, &mut portable, (k, n));
                let mut ordered = a.clone();
                M::order_columns(&mut ordered);
                M::multiply_codes(&ordered, stride, &x, &mut ours, (k, n));
                assert_eq!(ours, portable, "multiply_codes {case}");
            }
            for (k, n) in [(64, 1), (64, 2), (128, 3), (192, 4), (64, 7), (1024, 5)] {
                // No sum may exceed 32 bits, as the callers see to it.
                let largest = LARGEST.min(8.4e6 / k as f32) as i32;
                let case = format!("{name} m={m} k={k} n={n}");
                let (a, b) = (integers(m * k, largest, 5), codes(n * k, 6));
                let [mut ours, mut portable] = [(); 2].map(|()| vec![7; m * n]);
                Portable::dot_codes(&a, &b, &mut portable, (k, n));
                M::dot_codes(&a, &b, &mut ours, (k, n));
                assert_eq!(ours, portable, "dot_codes {case}");
            }
        }
    }

    #[test]
    fn products_with_codes_are_those_of_the_portable_text() {
        for isa in available_isas() {
            match isa {
                Isa::Portable => {}
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => agrees_with_portable::<super::super::multiply_x86::Avx2>(isa.name()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => agrees_with_portable::<super::super::multiply_x86::Avx512>(isa.name()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Vnni => agrees_with_portable::<super::super::multiply_x86::Avx512Vnni>(isa.name()),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => agrees_with_portable::<super::super::multiply_neon::Neon>(isa.name()),
            }
        }
    }
}
