//! Registers as values of Rust.

/// Eight numbers as tiles hold them. Not `float32x4x2_t`: storing one takes neighbouring registers, for which the compiler
/// moves sums to the stack in the middle of a tile.
pub(super) type Octet<T> = [T; 2];

/// One intrinsic, or a few, as a method. All of them share one reason to be safe.
macro_rules! with_neon {
    ($value:expr) => {
        // SAFETY: values of these types are made only where the CPU has NEON; memory is reached through references to
        // arrays of the length that is read or written, or through pointers of which the caller promises as much.
        unsafe { $value }
    };
}

pub(super) use with_neon;
