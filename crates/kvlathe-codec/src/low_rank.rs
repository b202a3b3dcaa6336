//! The seed API's coding: a projection on the leading directions of a basis that the heads of a layer share, stored
//! as int8 with one scale a vector, or as float16.
//!
//! y = Uᵀ(x − m), x̂ = U·ŷ + m, with U of `rank` orthonormal columns.

use half::f16;

use crate::element::Element;
use crate::error::{CodecError, Result};

/// Largest allowed entry of |UᵀU − I|; U may have passed through float16.
pub const ORTHONORMAL_LIMIT: f64 = 1e-3;

/// How the projected vector is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// One signed byte a component and a float32 scale a vector.
    Int8,
    /// float16 components.
    Float16,
}

impl Storage {
    /// Bytes of one projected vector.
    #[must_use]
    pub const fn vector_bytes(self, rank: usize) -> usize {
        match self {
            Self::Int8 => rank + 4,
            Self::Float16 => 2 * rank,
        }
    }
}

/// A shared basis and its mean.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    head_dim: usize,
    rank: usize,
    /// Uᵀ, `[rank, head_dim]`.
    u_transposed: Vec<f32>,
    mean: Vec<f32>,
    storage: Storage,
}

impl LowRank {
    /// `u` is `[head_dim, rank]` row-major with orthonormal columns, `mean` is `[head_dim]`.
    ///
    /// # Errors
    /// Wrong lengths, a rank outside 1..=head_dim, values that are not finite, columns that are not orthonormal.
    pub fn new(u: &[f32], mean: &[f32], rank: usize, storage: Storage) -> Result<Self> {
        let d = mean.len();
        if rank == 0 || rank > d {
            return Err(CodecError::Range { what: "rank", given: rank, expected: "1 to head_dim" });
        }
        if u.len() != d * rank {
            return Err(CodecError::Length { what: "U", given: u.len(), expected: d * rank });
        }
        for (what, values) in [("U", u), ("mean", mean)] {
            if values.iter().any(|v| !v.is_finite()) {
                return Err(CodecError::NonFiniteParameter { what });
            }
        }
        let mut deviation = 0.0f64;
        for a in 0..rank {
            for b in a..rank {
                let dot: f64 = (0..d).map(|j| f64::from(u[j * rank + a]) * f64::from(u[j * rank + b])).sum();
                deviation = deviation.max((dot - f64::from(u8::from(a == b))).abs());
            }
        }
        if deviation > ORTHONORMAL_LIMIT {
            return Err(CodecError::NotOrthonormal { deviation, limit: ORTHONORMAL_LIMIT });
        }
        let u_transposed = (0..rank).flat_map(|r| (0..d).map(move |j| u[j * rank + r])).collect();
        Ok(Self { head_dim: d, rank, u_transposed, mean: mean.to_vec(), storage })
    }

    /// Components of a vector.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Components that are kept.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How they are stored.
    #[must_use]
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Bytes of one coded vector.
    #[must_use]
    pub fn vector_bytes(&self) -> usize {
        self.storage.vector_bytes(self.rank)
    }

    /// Encodes one vector of `head_dim` components into `vector_bytes` bytes.
    ///
    /// int8: codes yᵣ/s rounded to nearest, s = max|y|/127, so |yᵣ − ŷᵣ| ≤ s/2.
    pub fn encode<E: Element>(&self, x: &[E], out: &mut [u8]) {
        let mut y = vec![0.0f32; self.rank];
        let centred: Vec<f32> = x.iter().zip(&self.mean).map(|(v, m)| v.to_f32() - m).collect();
        for (value, row) in y.iter_mut().zip(self.u_transposed.chunks_exact(self.head_dim)) {
            *value = row.iter().zip(&centred).map(|(a, b)| a * b).sum();
        }
        match self.storage {
            Storage::Int8 => {
                let largest = y.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                let (codes, scale) = out.split_at_mut(self.rank);
                for (code, value) in codes.iter_mut().zip(&y) {
                    *code = (value * inverse).round() as i8 as u8;
                }
                scale.copy_from_slice(&(largest / 127.0).to_le_bytes());
            }
            Storage::Float16 => {
                for (bytes, value) in out.chunks_exact_mut(2).zip(&y) {
                    bytes.copy_from_slice(&<f16 as Element>::from_f32(*value).to_le_bytes());
                }
            }
        }
    }

    /// Decodes one vector.
    pub fn decode<E: Element>(&self, coded: &[u8], out: &mut [E]) {
        let mut x = self.mean.clone();
        let scale = match self.storage {
            Storage::Int8 => {
                let s = &coded[self.rank..];
                f32::from_le_bytes([s[0], s[1], s[2], s[3]])
            }
            Storage::Float16 => 1.0,
        };
        for (r, row) in self.u_transposed.chunks_exact(self.head_dim).enumerate() {
            let y = match self.storage {
                Storage::Int8 => f32::from(coded[r] as i8) * scale,
                Storage::Float16 => f16::from_le_bytes([coded[2 * r], coded[2 * r + 1]]).to_f32(),
            };
            for (value, u) in x.iter_mut().zip(row) {
                *value += y * u;
            }
        }
        for (value, decoded) in out.iter_mut().zip(&x) {
            *value = E::from_f32(*decoded);
        }
    }
}
