//! Key, value and query tensors: borrowed, as torch hands them over, and those of a caller without tensors of its own.

use kvlathe_codec::{Element, memory};

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

/// `[batch, heads, tokens, head_dim]`, contiguous, with numbers of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<E> {
    data: Vec<E>,
    shape: [usize; 4],
}

impl<E: Element> Tensor<E> {
    /// Zeros.
    ///
    /// # Errors
    /// No memory for `what`.
    pub(crate) fn zeros(shape: [usize; 4], what: &'static str) -> Result<Self> {
        let n = shape.iter().fold(1, |n: usize, &len| n.saturating_mul(len));
        Ok(Self { data: memory::filled(n, E::default(), what)?, shape })
    }

    /// A tensor of what `next` gives, in the order of memory.
    ///
    /// # Panics
    /// No memory, or more numbers than there are addresses.
    #[must_use]
    pub fn from_fn(shape: [usize; 4], next: impl FnMut() -> E) -> Self {
        let n = shape.iter().product();
        Self { data: std::iter::repeat_with(next).take(n).collect(), shape }
    }

    /// The numbers, in the order of the shape.
    #[must_use]
    pub fn data(&self) -> &[E] {
        &self.data
    }

    /// As [`Tensor::data`], to be written.
    pub fn data_mut(&mut self) -> &mut [E] {
        &mut self.data
    }

    /// What a cache takes.
    #[must_use]
    pub fn view(&self) -> TensorView<'_, E> {
        let [_, heads, tokens, d] = self.shape;
        TensorView { data: &self.data, shape: self.shape, strides: [heads * tokens * d, tokens * d, d] }
    }
}
