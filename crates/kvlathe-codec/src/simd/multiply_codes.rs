//! The products of integers with codes, which are one byte each.

/// Rows of codes that lie interleaved for products over coefficients.
pub(crate) const QUAD: usize = 4;
/// Elements that [`MultiplyCodes::dot_codes`] takes at a time.
pub(crate) const DOT_STEP: usize = 64;

/// Products with codes on one instruction set; integers are exact, so all give the same bits.
pub(crate) trait MultiplyCodes {
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
pub(crate) fn check_columns(
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
pub(crate) fn check_rows(a: &[i16], b: &[u8], out: &[i32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && out.len().is_multiple_of(n) && k.is_multiple_of(DOT_STEP));
    let m = out.len() / n;
    assert!(a.len() >= m * k && b.len() >= n * k);
    m
}
