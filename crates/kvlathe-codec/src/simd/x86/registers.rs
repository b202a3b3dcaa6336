//! Registers as values of Rust.

/// One intrinsic, or a few, as a method. All of them share one reason to be safe.
macro_rules! with_registers {
    ($value:expr) => {
        // SAFETY: values of these types are made only inside functions that enable AVX2 and FMA, or AVX-512; memory is
        // reached through references to arrays of the length that is read or written, or through pointers of which the
        // caller promises as much.
        unsafe { $value }
    };
}

pub(super) use with_registers;
