//! Memory that may not be had. Whatever grows with the number of tokens, queries or rows is asked for here, before
//! anything is changed: a process at its limit gets an error instead of being aborted.

use crate::error::{CodecError, Result};

/// Makes room for `more` elements beyond those held.
///
/// # Errors
/// No memory; what is held stays as it is. So it is with the other functions here.
pub fn reserve<T>(held: &mut Vec<T>, more: usize, what: &'static str) -> Result<()> {
    let bytes = more.saturating_mul(size_of::<T>());
    held.try_reserve_exact(more).map_err(|_| CodecError::OutOfMemory { what, bytes })
}

/// A vector with room for `len` elements.
///
/// # Errors
/// No memory.
pub fn room<T>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let mut new = Vec::new();
    reserve(&mut new, len, what)?;
    Ok(new)
}

/// `len` times the same element.
///
/// # Errors
/// No memory.
pub fn filled<T: Clone>(len: usize, value: T, what: &'static str) -> Result<Vec<T>> {
    let mut new = room(len, what)?;
    new.resize(len, value);
    Ok(new)
}

/// Makes what is held `len` times the same element; what was allocated serves again.
///
/// # Errors
/// No memory.
pub fn refill<T: Clone>(held: &mut Vec<T>, len: usize, value: T, what: &'static str) -> Result<()> {
    held.clear();
    reserve(held, len, what)?;
    held.resize(len, value);
    Ok(())
}

/// Makes at least `len` of what is held, the new ones by `make`.
///
/// # Errors
/// No memory.
pub fn grow<T>(held: &mut Vec<T>, len: usize, make: impl FnMut() -> T, what: &'static str) -> Result<()> {
    if held.len() < len {
        reserve(held, len - held.len(), what)?;
        held.resize_with(len, make);
    }
    Ok(())
}

/// A copy.
///
/// # Errors
/// No memory.
pub fn copied<T: Clone>(held: &[T], what: &'static str) -> Result<Vec<T>> {
    let mut new = room(held.len(), what)?;
    new.extend_from_slice(held);
    Ok(new)
}
