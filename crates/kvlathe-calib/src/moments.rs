//! Streaming moments: all that calibration keeps of the text it has seen. Their size does not depend on its length.

use kvlathe_codec::{Rope, Rotation};

use crate::error::{CalibError, Result};
use crate::symmetric::add_outer;

/// Moments of one stream. Keys are turned back to position zero (pre-RoPE) before they are added.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamMoments {
    pub(crate) head_dim: usize,
    /// Tokens added.
    pub(crate) n_tokens: u64,
    /// Σ s, shapes s = x/γ with γ = ‖x‖/√d.
    pub(crate) shape_sum: Vec<f64>,
    /// Σ s·sᵀ, lower triangle.
    pub(crate) shape_outer: Vec<f64>,
    /// Σ γ².
    pub(crate) gain_squared_sum: f64,
    /// Σ γ²·g·gᵀ, lower triangle: g is the gradient of the log-likelihood with respect to the vector.
    pub(crate) fisher_outer: Vec<f64>,
    /// Tokens whose gradients were added.
    pub(crate) n_fisher: u64,
    /// Σ q·qᵀ of the queries that read a key stream, lower triangle, pre-RoPE; the fallback without gradients.
    pub(crate) query_outer: Vec<f64>,
    /// Queries added.
    pub(crate) n_queries: u64,
}

/// Moments of the raw vectors of one layer's keys or values, heads pooled, as the model stores them: the seed's PCA.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedMoments {
    pub(crate) head_dim: usize,
    pub(crate) n_vectors: u64,
    pub(crate) sum: Vec<f64>,
    /// Lower triangle.
    pub(crate) outer: Vec<f64>,
}

impl SharedMoments {
    /// No vectors yet.
    #[must_use]
    pub fn new(head_dim: usize) -> Self {
        Self { head_dim, n_vectors: 0, sum: vec![0.0; head_dim], outer: vec![0.0; head_dim * head_dim] }
    }

    /// Adds vectors `[n, head_dim]`.
    pub fn add(&mut self, x: &[f32]) {
        let mut wide = vec![0.0; self.head_dim];
        for vector in x.chunks_exact(self.head_dim) {
            for ((w, s), v) in wide.iter_mut().zip(&mut self.sum).zip(vector) {
                *w = f64::from(*v);
                *s += *w;
            }
            add_outer(&mut self.outer, &wide);
            self.n_vectors += 1;
        }
    }
}

/// The rotations R(−p) of consecutive positions, made once a window and shared by heads.
#[derive(Debug, Clone)]
pub struct TurnBack(Vec<Rotation>);

impl TurnBack {
    /// For positions `first_position..first_position + n_tokens`.
    #[must_use]
    pub fn new(rope: &Rope, first_position: usize, n_tokens: usize) -> Self {
        Self((first_position..first_position + n_tokens).map(|p| rope.rotation(-(p as i64))).collect())
    }
}

impl StreamMoments {
    /// No tokens yet.
    #[must_use]
    pub fn new(head_dim: usize) -> Self {
        let square = || vec![0.0; head_dim * head_dim];
        Self {
            head_dim,
            n_tokens: 0,
            shape_sum: vec![0.0; head_dim],
            shape_outer: square(),
            gain_squared_sum: 0.0,
            fisher_outer: square(),
            n_fisher: 0,
            query_outer: square(),
            n_queries: 0,
        }
    }

    /// Tokens added so far.
    #[must_use]
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Adds tokens `x` `[n, head_dim]` with gradients `[n, head_dim]` of the log-likelihood, if there are any.
    ///
    /// # Errors
    /// Lengths that do not match.
    pub fn add(&mut self, x: &[f32], gradients: Option<&[f32]>, turn_back: Option<&TurnBack>) -> Result<()> {
        let d = self.head_dim;
        let n = x.len() / d;
        self.check_lengths(x.len(), turn_back)?;
        if let Some(g) = gradients
            && g.len() != x.len()
        {
            return Err(CalibError::Length { what: "the gradients", given: g.len(), expected: x.len() });
        }
        let mut vector = vec![0.0f32; d];
        let mut wide = vec![0.0f64; d];
        for t in 0..n {
            vector.copy_from_slice(&x[t * d..(t + 1) * d]);
            turn(&mut vector, turn_back, t);
            let norm_squared: f64 = vector.iter().map(|v| f64::from(*v).powi(2)).sum();
            let gain = (norm_squared / d as f64).sqrt();
            self.n_tokens += 1;
            if gain == 0.0 {
                // The zero vector has no shape and is coded without error.
                continue;
            }
            self.gain_squared_sum += gain * gain;
            for ((w, s), v) in wide.iter_mut().zip(&mut self.shape_sum).zip(&vector) {
                *w = f64::from(*v) / gain;
                *s += *w;
            }
            add_outer(&mut self.shape_outer, &wide);
            if let Some(g) = gradients {
                vector.copy_from_slice(&g[t * d..(t + 1) * d]);
                turn(&mut vector, turn_back, t);
                for (w, v) in wide.iter_mut().zip(&vector) {
                    *w = f64::from(*v) * gain;
                }
                add_outer(&mut self.fisher_outer, &wide);
            }
        }
        if gradients.is_some() {
            self.n_fisher += n as u64;
        }
        Ok(())
    }

    /// Adds queries `q` `[n, head_dim]` at the positions of `turn_back` that read this key stream.
    ///
    /// # Errors
    /// Lengths that do not match.
    pub fn add_queries(&mut self, q: &[f32], turn_back: Option<&TurnBack>) -> Result<()> {
        self.check_lengths(q.len(), turn_back)?;
        let mut vector = vec![0.0f32; self.head_dim];
        for (t, query) in q.chunks_exact(self.head_dim).enumerate() {
            vector.copy_from_slice(query);
            turn(&mut vector, turn_back, t);
            let wide: Vec<f64> = vector.iter().map(|v| f64::from(*v)).collect();
            add_outer(&mut self.query_outer, &wide);
            self.n_queries += 1;
        }
        Ok(())
    }

    fn check_lengths(&self, len: usize, turn_back: Option<&TurnBack>) -> Result<()> {
        let d = self.head_dim;
        if !len.is_multiple_of(d) {
            return Err(CalibError::Length { what: "the vectors", given: len, expected: len / d * d });
        }
        match turn_back {
            Some(turn) if turn.0.len() != len / d => {
                Err(CalibError::Length { what: "the positions", given: turn.0.len(), expected: len / d })
            }
            _ => Ok(()),
        }
    }
}

fn turn(vector: &mut [f32], turn_back: Option<&TurnBack>, t: usize) {
    if let Some(turn_back) = turn_back {
        turn_back.0[t].apply(vector);
    }
}
