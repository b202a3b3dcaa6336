//! Products in tiles of rows × columns whose sums stay in registers, written once over what an instruction set does with
//! one vector.
//!
//! Tiles are two vectors (or four rows of the other matrix) wide, then single ones. Rows are taken as many at a time as the
//! registers have room for, then in one tile for the rest, so that seven queries are one tile and not three. Everything
//! here becomes part of the function that calls it, and has its instruction set.

/// One vector of columns of out[m, n] = a[m, k] · x, with x as `[k/STEP, n, STEP]`.
pub(crate) trait Columns<A, X> {
    /// Columns of a vector.
    const LANES: usize;
    /// Rows of x that lie interleaved.
    const STEP: usize;
    /// Rows of a tile whose sums, two vectors each, leave registers for the rest.
    const TALLEST: usize;
    type Out;
    type Sum: Copy;
    /// `STEP` rows of x, `LANES` columns.
    type Values: Copy;
    /// `STEP` elements of a row of a.
    type Factor: Copy;
    /// What takes the columns that fill no vector.
    type Narrow: Columns<A, X, Out = Self::Out>;

    fn zero() -> Self::Sum;
    /// # Safety
    /// `from` points to `STEP · LANES` elements.
    unsafe fn load(from: *const X) -> Self::Values;
    /// # Safety
    /// `from` points to `STEP` elements.
    unsafe fn factor(from: *const A) -> Self::Factor;
    /// sum + factor · values.
    fn add(sum: Self::Sum, values: Self::Values, factor: Self::Factor) -> Self::Sum;
    /// # Safety
    /// `to` points to `LANES` elements.
    unsafe fn store(sum: Self::Sum, to: *mut Self::Out);
}

/// One vector of the elements of a row, for out[m, n] = a[m, k] · b[n, k]ᵀ.
pub(crate) trait Rows<A, B> {
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of a tile whose sums, one for each of four rows of b, leave registers for the rest.
    const TALLEST: usize;
    type Out;
    type Sum: Copy;
    type Values: Copy;
    type Factors: Copy;

    fn zero() -> Self::Sum;
    /// # Safety
    /// `from` points to `LANES` elements.
    unsafe fn load(from: *const B) -> Self::Values;
    /// # Safety
    /// `from` points to `LANES` elements.
    unsafe fn factors(from: *const A) -> Self::Factors;
    /// sum + factors · values, lane by lane.
    fn add(sum: Self::Sum, values: Self::Values, factors: Self::Factors) -> Self::Sum;
    /// The sum of all lanes.
    fn total(sum: Self::Sum) -> Self::Out;
    /// total + a · b.
    fn add_one(total: Self::Out, a: A, b: B) -> Self::Out;
}

/// Calls `$tile::<S, _, _, ROWS, $span>` for all rows `$row` below `$m`: `$tallest` of them at a time, at most twelve, then
/// the rest. Taller tiles are known to be never called, and are not compiled.
macro_rules! for_rows {
    ($m:expr, $tallest:expr, |$row:ident| $tile:ident, $span:expr, $args:tt) => {
        let mut $row = 0;
        while $row + $tallest <= $m {
            for_rows!(@below $tallest + 1, $tallest, $tile, $span, $args, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
            $row += $tallest;
        }
        for_rows!(@below $tallest, $m - $row, $tile, $span, $args, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    };
    (@below $limit:expr, $height:expr, $tile:ident, $span:expr, $args:tt, [$($rows:literal),*]) => {
        match $height {
            $($rows if $rows < $limit => for_rows!(@call $tile, $rows, $span, $args),)*
            _ => {}
        }
    };
    (@call $tile:ident, $rows:literal, $span:expr, ($($arg:expr),*)) => {
        $tile::<S, _, _, $rows, $span>($($arg),*)
    };
}

/// out[m, n] = a[m, k] · x; `shape` is (m, k, n), rows of a begin `a_stride` apart, n is a multiple of eight.
#[inline(always)]
pub(crate) fn multiply<S: Columns<A, X>, A, X>(
    a: &[A],
    a_stride: usize,
    x: &[X],
    out: &mut [S::Out],
    (m, k, n): (usize, usize, usize),
) {
    let mut column = 0;
    while n - column >= 2 * S::LANES {
        for_rows!(m, S::TALLEST, |row| column_tile, 2, (a, a_stride, x, out, (row, column), (k, n)));
        column += 2 * S::LANES;
    }
    while n - column >= S::LANES {
        for_rows!(m, S::TALLEST, |row| column_tile, 1, (a, a_stride, x, out, (row, column), (k, n)));
        column += S::LANES;
    }
    // A block of eight tokens on AVX-512: half a vector.
    while column < n {
        for row in 0..m {
            column_tile::<S::Narrow, _, _, 1, 1>(a, a_stride, x, out, (row, column), (k, n));
        }
        column += S::Narrow::LANES;
    }
}

/// `ROWS` rows × `VECTORS` vectors of columns from (row, column) on.
#[inline(always)]
fn column_tile<S: Columns<A, X>, A, X, const ROWS: usize, const VECTORS: usize>(
    a: &[A],
    a_stride: usize,
    x: &[X],
    out: &mut [S::Out],
    (row, column): (usize, usize),
    (k, n): (usize, usize),
) {
    assert!(column + VECTORS * S::LANES <= n && k <= a_stride && k.is_multiple_of(S::STEP));
    assert!(x.len() >= k * n && a.len() >= (row + ROWS - 1) * a_stride + k);
    assert!(out.len() >= (row + ROWS) * n);
    let mut sums = [[S::zero(); VECTORS]; ROWS];
    for step in 0..k / S::STEP {
        let j = step * S::STEP;
        let at = S::STEP * (step * n + column);
        // SAFETY: j·n + STEP·(column + VECTORS·LANES) ≤ k·n ≤ x.len(), asserted above.
        let mut values = [unsafe { S::load(x.as_ptr().add(at)) }; VECTORS];
        for v in 1..VECTORS {
            // SAFETY: as above.
            values[v] = unsafe { S::load(x.as_ptr().add(at + v * S::STEP * S::LANES)) };
        }
        for r in 0..ROWS {
            // SAFETY: (row + r)·a_stride + j + STEP ≤ (row + ROWS − 1)·a_stride + k ≤ a.len(), asserted above.
            let factor = unsafe { S::factor(a.as_ptr().add((row + r) * a_stride + j)) };
            for v in 0..VECTORS {
                sums[r][v] = S::add(sums[r][v], values[v], factor);
            }
        }
    }
    for r in 0..ROWS {
        for v in 0..VECTORS {
            // SAFETY: (row + r)·n + column + VECTORS·LANES ≤ (row + ROWS)·n ≤ out.len(), asserted above.
            unsafe { S::store(sums[r][v], out.as_mut_ptr().add((row + r) * n + column + v * S::LANES)) };
        }
    }
}

/// out[m, n] = a[m, k] · b[n, k]ᵀ; `shape` is (m, k, n).
#[inline(always)]
pub(crate) fn dot<S: Rows<A, B>, A: Copy, B: Copy>(
    a: &[A],
    b: &[B],
    out: &mut [S::Out],
    (m, k, n): (usize, usize, usize),
) {
    let mut column = 0;
    while n - column >= 4 {
        for_rows!(m, S::TALLEST, |row| row_tile, 4, (a, b, out, (row, column), (k, n)));
        column += 4;
    }
    while column < n {
        for_rows!(m, S::TALLEST, |row| row_tile, 1, (a, b, out, (row, column), (k, n)));
        column += 1;
    }
}

/// Dot products of `ROWS` rows of `a` with `COLUMNS` rows of `b`.
#[inline(always)]
fn row_tile<S: Rows<A, B>, A: Copy, B: Copy, const ROWS: usize, const COLUMNS: usize>(
    a: &[A],
    b: &[B],
    out: &mut [S::Out],
    (row, column): (usize, usize),
    (k, n): (usize, usize),
) {
    assert!(column + COLUMNS <= n && out.len() >= (row + ROWS) * n);
    assert!(a.len() >= (row + ROWS) * k && b.len() >= (column + COLUMNS) * k);
    let mut sums = [[S::zero(); COLUMNS]; ROWS];
    let whole = k / S::LANES * S::LANES;
    let mut t = 0;
    while t < whole {
        // SAFETY: (column + COLUMNS − 1)·k + t + LANES ≤ (column + COLUMNS)·k ≤ b.len(), asserted above.
        let mut values = [unsafe { S::load(b.as_ptr().add(column * k + t)) }; COLUMNS];
        for c in 1..COLUMNS {
            // SAFETY: as above.
            values[c] = unsafe { S::load(b.as_ptr().add((column + c) * k + t)) };
        }
        for r in 0..ROWS {
            // SAFETY: (row + r)·k + t + LANES ≤ (row + ROWS)·k ≤ a.len(), asserted above.
            let factors = unsafe { S::factors(a.as_ptr().add((row + r) * k + t)) };
            for c in 0..COLUMNS {
                sums[r][c] = S::add(sums[r][c], values[c], factors);
            }
        }
        t += S::LANES;
    }
    for r in 0..ROWS {
        for c in 0..COLUMNS {
            let mut total = S::total(sums[r][c]);
            for t in whole..k {
                total = S::add_one(total, a[(row + r) * k + t], b[(column + c) * k + t]);
            }
            out[(row + r) * n + column + c] = total;
        }
    }
}

/// Implements the products of an instruction set by tiles: one function for each, which enables its features.
macro_rules! tiled_products {
    ($set:ident, $features:literal, $f32x8:ty, $f32x16:ty, $order_columns:expr) => {
        impl Multiply for $set {
            type F32x8 = $f32x8;
            type F32x16 = $f32x16;

            #[inline(always)]
            fn multiply(a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize)) {
                #[target_feature(enable = $features)]
                #[inline]
                fn tiled(a: &[f32], x: &[f32], out: &mut [f32], (k, n): (usize, usize)) {
                    let m = check_shape(a, x, out, (k, n));
                    tiles::multiply::<$set, f32, f32>(a, k, x, out, (m, k, n));
                }
                // SAFETY: the type is named only inside functions that enable these features.
                unsafe { tiled(a, x, out, shape) }
            }

            #[inline(always)]
            fn dot(a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize)) {
                #[target_feature(enable = $features)]
                #[inline]
                fn tiled(a: &[f32], b: &[f32], out: &mut [f32], (k, n): (usize, usize)) {
                    let m = check_dot(a, b, out, (k, n));
                    tiles::dot::<$set, f32, f32>(a, b, out, (m, k, n));
                }
                // SAFETY: as above.
                unsafe { tiled(a, b, out, shape) }
            }

            #[inline(always)]
            fn multiply_i16(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], shape: (usize, usize)) {
                #[target_feature(enable = $features)]
                #[inline]
                fn tiled(a: &[i16], a_stride: usize, x: &[i16], out: &mut [i32], (k, n): (usize, usize)) {
                    let m = check_pairs(a, a_stride, x, out, (k, n));
                    tiles::multiply::<$set, i16, i16>(a, a_stride, x, out, (m, k, n));
                }
                // SAFETY: as above.
                unsafe { tiled(a, a_stride, x, out, shape) }
            }
        }

        impl MultiplyCodes for $set {
            #[inline(always)]
            fn order_columns(a: &mut [i16]) {
                $order_columns(a);
            }

            #[inline(always)]
            fn multiply_codes(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], shape: (usize, usize)) {
                #[target_feature(enable = $features)]
                #[inline]
                fn tiled(a: &[i16], a_stride: usize, x: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
                    let m = check_columns(a, a_stride, x, out, (k, n));
                    tiles::multiply::<$set, i16, u8>(a, a_stride, x, out, (m, k, n));
                }
                // SAFETY: as above.
                unsafe { tiled(a, a_stride, x, out, shape) }
            }

            #[inline(always)]
            fn dot_codes(a: &[i16], b: &[u8], out: &mut [i32], shape: (usize, usize)) {
                #[target_feature(enable = $features)]
                #[inline]
                fn tiled(a: &[i16], b: &[u8], out: &mut [i32], (k, n): (usize, usize)) {
                    let m = check_rows(a, b, out, (k, n));
                    tiles::dot::<$set, i16, u8>(a, b, out, (m, k, n));
                }
                // SAFETY: as above.
                unsafe { tiled(a, b, out, shape) }
            }
        }
    };
}

pub(crate) use tiled_products;
