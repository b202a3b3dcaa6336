//! The matrix product that encode and decode spend their time in.

/// out[m, n] = a[m, k] · x[k, n], all row-major; `out.len() = m·n`, n is one of the block lengths.
///
/// Each entry is one chain of fused multiply-adds in rising k, on every instruction set.
pub(super) trait Multiply {
    /// Computes the product; `(k, n)` are the inner dimension and the number of tokens.
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize));
}

/// Panics unless the slices have the lengths that the shape asks for: the bounds that unchecked loads rely on.
#[inline(always)]
pub(super) fn check_shape(a: &[f32], x: &[f32], out: &[f32], (k, n): (usize, usize)) -> usize {
    assert!(n > 0 && n.is_multiple_of(8) && out.len().is_multiple_of(n));
    let m = out.len() / n;
    assert!(a.len() >= m * k && x.len() >= k * n);
    m
}

/// No more than the build's target guarantees.
pub(super) struct Portable;

impl Multiply for Portable {
    #[inline(always)]
    fn multiply(a: &[f32], x: &[f32], out: &mut [f32], (k, n): (usize, usize)) {
        let m = check_shape(a, x, out, (k, n));
        for i in 0..m {
            let sums = &mut out[i * n..(i + 1) * n];
            sums.fill(0.0);
            for j in 0..k {
                let factor = a[i * k + j];
                for (sum, value) in sums.iter_mut().zip(&x[j * n..(j + 1) * n]) {
                    *sum = factor.mul_add(*value, *sum);
                }
            }
        }
    }
}
