//! How a product is cut into tiles of rows × columns, whose size the compiler knows.

/// Calls `$tile::<ROWS, SPAN>` for all rows and columns of `$shape` = (m, n), as far as whole `$step`s of columns go, and
/// gives the column where it ended. Spans are `$wide` steps, then single ones. Rows are taken `$tallest` at a time, then
/// in one tile for the rest, so that seven queries are one tile and not three. `$args` may use `$row` and `$column`.
macro_rules! for_tiles {
    ($tile:ident, $shape:expr, ($tallest:literal, $rows:tt), ($wide:literal, $step:expr), |$row:ident, $column:ident| $args:tt) => {{
        let (m, n) = $shape;
        let mut $column = 0;
        while n - $column >= $wide * $step {
            for_tiles!(@rows $tile, m, $tallest, $rows, $wide, $row, $args);
            $column += $wide * $step;
        }
        while n - $column >= $step {
            for_tiles!(@rows $tile, m, $tallest, $rows, 1, $row, $args);
            $column += $step;
        }
        $column
    }};
    (@rows $tile:ident, $m:expr, $tallest:literal, [$($rest:literal),*], $span:literal, $row:ident, $args:tt) => {{
        let mut $row = 0;
        while $row + $tallest <= $m {
            for_tiles!(@call $tile, $tallest, $span, $args);
            $row += $tallest;
        }
        match $m - $row {
            $($rest => for_tiles!(@call $tile, $rest, $span, $args),)*
            _ => {}
        }
    }};
    (@call $tile:ident, $rows:literal, $span:literal, ($($arg:expr),*)) => {
        Self::$tile::<$rows, $span>($($arg),*)
    };
}

pub(super) use for_tiles;
