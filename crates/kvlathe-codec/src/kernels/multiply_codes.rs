//! The products of integers with codes, once these are bytes. Tested with the others, in [`super::multiply`].

use super::codes::QUAD;

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
    assert!(k.is_multiple_of(QUAD) && k <= a_stride && a_stride.is_multiple_of(8));
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
            for j in (0..k).step_by(QUAD) {
                let a = &a[i * a_stride + j..][..QUAD];
                for (sum, codes) in sums.iter_mut().zip(x[j * n..(j + QUAD) * n].chunks_exact(QUAD)) {
                    for r in 0..QUAD {
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
