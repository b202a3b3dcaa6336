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
            0
        } else {
            let last: usize = shape[..3].iter().zip(strides).map(|(n, s)| (n - 1) * s).sum();
            last + shape[3]
        };
        if data.len() < needed {
            return Err(CacheError::Buffer { what: "tensor", given: data.len(), expected: needed });
        }
        Ok(Self { data, shape, strides })
    }

    /// A contiguous tensor.
    ///
    /// # Errors
    /// A buffer shorter than the shape.
    pub fn contiguous(data: &'a [E], shape: [usize; 4]) -> Result<Self> {
        Self::new(data, shape, [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]])
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
