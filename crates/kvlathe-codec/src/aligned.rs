//! Buffers that begin at a cache line: a vector of 64 bytes then lies in one line, not across two, which costs a
//! second access.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use crate::error::Result;
use crate::memory;

/// Bytes of a cache line, and of the widest vector.
pub(crate) const LINE_BYTES: usize = 64;

/// A cache line.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u8; LINE_BYTES]);

/// Numbers, the first of them at the beginning of a cache line.
#[derive(Clone)]
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// No memory for `what`.
    pub fn zeros(len: usize, what: &'static str) -> Result<Self> {
        let mut new = Self::default();
        new.resize(len, what)?;
        Ok(new)
    }

    /// Sets the length. What was held may stay, in place; the rest is anything: zeros or what was held before.
    ///
    /// # Errors
    /// No memory for `what`.
    pub fn resize(&mut self, len: usize, what: &'static str) -> Result<()> {
        const { assert!(LINE_BYTES.is_multiple_of(size_of::<T>()), "numbers do not fill lines") };
        let n_lines = len.div_ceil(LINE_BYTES / size_of::<T>());
        let held = self.lines.len();
        if n_lines > held {
            memory::reserve(&mut self.lines, n_lines - held, what)?;
            self.lines.resize(n_lines, Line::zeroed());
        }
        self.len = len;
        Ok(())
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, numbers: PhantomData }
    }
}

impl<T: Pod> From<&[T]> for Aligned<T> {
    /// # Panics
    /// No memory: for tables, whose size does not depend on what is coded.
    fn from(numbers: &[T]) -> Self {
        let mut new = Self::zeros(numbers.len(), "a table").expect("memory for a table");
        new.copy_from_slice(numbers);
        new
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::{Aligned, LINE_BYTES};

    #[test]
    fn numbers_stay_in_place_at_the_beginning_of_a_line() {
        let mut lines = Aligned::zeros(3, "numbers").unwrap();
        lines.copy_from_slice(&[1i16, -2, 3]);
        for len in [5, 1000, 2, 33] {
            lines.resize(len, "numbers").unwrap();
            assert_eq!(lines.len(), len);
            assert_eq!(lines[..2], [1, -2]);
            assert!(lines.as_ptr().addr().is_multiple_of(LINE_BYTES));
        }
        assert_eq!(Aligned::from(&[0.5f64; 9][..])[..], [0.5; 9]);
        assert!(Aligned::<f32>::zeros(usize::MAX / 64, "numbers").is_err(), "no such memory");
    }
}
