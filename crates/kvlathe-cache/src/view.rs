//! A borrowed key or value tensor as torch hands it over.

use crate::error::{CacheError, Result};

/// `[batch, heads, tokens, head_dim]`, components contiguous, the other strides free.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a, E> {
    data: &'a [E],
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<'a, E> TensorView<'a, E> {
    /// `strides` are those of batch, heads and tokens, in elements.
    ///
    /// # Errors
    /// A buffer that ends before the last element.
    pub fn new(data: &'a [E], shape: [usize; 4], strides: [usize; 3]) -> Result<Self> {
        let needed = if shape.contains(&0) {
            Some(0)
        } else {
            // Strides may be anything, so their sum may be no number at all.
            let steps = shape[..3].iter().zip(strides);
            steps.into_iter().try_fold(shape[3], |sum, (n, s)| sum.checked_add((n - 1).checked_mul(s)?))
        };
        let expected = needed.unwrap_or(usize::MAX);
        if needed.is_none() || data.len() < expected {
            return Err(CacheError::Buffer { what: "tensor", given: data.len(), expected });
        }
        Ok(Self { data, shape, strides })
    }

    /// A contiguous tensor.
    ///
    /// # Errors
    /// A buffer shorter than the shape.
    pub fn contiguous(data: &'a [E], shape: [usize; 4]) -> Result<Self> {
        let [_, heads, tokens, d] = shape;
        let head = tokens.saturating_mul(d);
        Self::new(data, shape, [heads.saturating_mul(head), head, d])
    }

    /// `[batch, heads, tokens, head_dim]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.shape[2]
    }

    /// The vector of one token.
    #[must_use]
    pub fn token(&self, row: usize, head: usize, token: usize) -> &'a [E] {
        let at = row * self.strides[0] + head * self.strides[1] + token * self.strides[2];
        &self.data[at..at + self.shape[3]]
    }
}
