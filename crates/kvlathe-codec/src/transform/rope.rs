//! The rotation that a model's rotary position embedding applies to its keys, and its inverse.
//!
//! RoPE (Su et al., "RoFormer", 2021) turns pair i of a key at position p by the angle p·fᵢ. The codec needs only the
//! pairing of components and the frequencies fᵢ: it turns a block's keys back by the angle of the block's centre c,
//! R(−c)·R(p)·k = R(p − c)·k, and the decoder turns them forward again. Both use the same angles, so the frame is
//! exact whatever the model does; wrong frequencies would only make the basis fit less well.

use std::str::FromStr;

use crate::error::{CodecError, ParseNameError, Result};
use crate::lanes::WIDE;

/// Which components form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// Component i with i + rotary_dim/2 (Llama, Qwen, Mistral, NeoX …).
    HalfSplit,
    /// Component 2i with 2i + 1 (GLM, Cohere, GPT-J …).
    Interleaved,
}

impl Pairing {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::HalfSplit, Self::Interleaved];

    /// `"half_split"` or `"interleaved"`, as in preset files; [`FromStr`] takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HalfSplit => "half_split",
            Self::Interleaved => "interleaved",
        }
    }
}

impl FromStr for Pairing {
    type Err = ParseNameError;

    fn from_str(text: &str) -> std::result::Result<Self, ParseNameError> {
        let error = || ParseNameError::new("pairing", text, "\"half_split\" or \"interleaved\"");
        Self::ALL.into_iter().find(|pairing| pairing.name() == text).ok_or_else(error)
    }
}

/// A rotary embedding: pairing, number of rotated components and frequencies in radians a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pairing: Pairing,
    rotary_dim: usize,
    inv_freq: Vec<f64>,
}

/// The rotation of one position: a cosine and a sine for each pair.
#[derive(Debug, PartialEq)]
pub struct Rotation {
    /// Padded to whole vectors of sixteen with pairs that do not turn.
    cos: Vec<f32>,
    sin: Vec<f32>,
    n_pairs: usize,
    pairing: Pairing,
}

impl Rope {
    /// A rotary embedding over the first `rotary_dim` components, `rotary_dim / 2` frequencies.
    ///
    /// # Errors
    /// An odd or empty `rotary_dim`, a wrong number of frequencies, or frequencies that are not finite.
    pub fn new(pairing: Pairing, rotary_dim: usize, inv_freq: Vec<f64>) -> Result<Self> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(CodecError::Range {
                what: "rotary_dim",
                given: rotary_dim,
                expected: "an even number, at least 2",
            });
        }
        if inv_freq.len() != rotary_dim / 2 {
            return Err(CodecError::Length {
                what: "inv_freq",
                given: inv_freq.len(),
                expected: rotary_dim / 2,
            });
        }
        if inv_freq.iter().any(|f| !f.is_finite()) {
            return Err(CodecError::NonFiniteParameter { what: "inv_freq" });
        }
        Ok(Self { pairing, rotary_dim, inv_freq })
    }

    /// Number of leading components that are rotated.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Which components form a pair.
    #[must_use]
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Frequencies in radians a token, one a pair.
    #[must_use]
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// R(position); a negative position is the inverse of the positive one.
    #[must_use]
    pub fn rotation(&self, position: i64) -> Rotation {
        let (sin, cos) = self.angles(position).map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        Rotation { cos, sin, n_pairs: self.inv_freq.len(), pairing: self.pairing }
    }

    /// Angles of all pairs at a position, then zeros to whole vectors of sixteen. In f64: at 10⁶ tokens f32 would be wrong by
    /// hundredths of a radian.
    fn angles(&self, position: i64) -> impl Iterator<Item = f64> {
        let n = self.inv_freq.len();
        let padding = std::iter::repeat_n(0.0, n.next_multiple_of(WIDE) - n);
        self.inv_freq.iter().copied().chain(padding).map(move |f| f * position as f64)
    }
}

impl Rotation {
    /// The two components of pair `i` and its cosine and sine.
    #[inline]
    fn pair(&self, i: usize) -> (usize, usize, f32, f32) {
        let (a, b) = match self.pairing {
            Pairing::HalfSplit => (i, i + self.n_pairs),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        (a, b, self.cos[i], self.sin[i])
    }

    /// Rotates one vector in place: (a, b) → (a·cos − b·sin, b·cos + a·sin).
    pub fn apply(&self, x: &mut [f32]) {
        self.apply_component_major(x, 1);
    }

    /// Rotates `n_tokens` vectors held component-major (`x[component * n_tokens + token]`) by the same angles.
    #[inline(always)]
    pub fn apply_component_major(&self, x: &mut [f32], n_tokens: usize) {
        for i in 0..self.n_pairs {
            let (a, b, cos, sin) = self.pair(i);
            let (lower, upper) = x.split_at_mut(b * n_tokens);
            let row_a = &mut lower[a * n_tokens..(a + 1) * n_tokens];
            let row_b = &mut upper[..n_tokens];
            for (xa, xb) in row_a.iter_mut().zip(row_b) {
                let (a0, b0) = (*xa, *xb);
                *xa = a0.mul_add(cos, -(b0 * sin));
                *xb = b0.mul_add(cos, a0 * sin);
            }
        }
    }
}

/// Rotations R(−c) of evenly spaced positions, each from the one before: a complex product a pair instead of a sine
/// and a cosine. In f64 the error grows by about 10⁻¹⁶ a step.
#[derive(Debug)]
pub struct RotationWalk {
    cos: Vec<f64>,
    sin: Vec<f64>,
    step_cos: Vec<f64>,
    step_sin: Vec<f64>,
    current: Rotation,
}

impl Rope {
    /// Begins at R(−`position`); each [`RotationWalk::advance`] adds `step` to the position.
    #[must_use]
    pub fn walk_back(&self, position: i64, step: i64) -> RotationWalk {
        let (step_sin, step_cos): (Vec<f64>, Vec<f64>) = self.angles(-step).map(f64::sin_cos).unzip();
        let n = step_cos.len();
        let (cos, sin) = (vec![0.0; n], vec![0.0; n]);
        let (n_pairs, pairing) = (self.inv_freq.len(), self.pairing);
        let current = Rotation { cos: vec![0.0; n], sin: vec![0.0; n], n_pairs, pairing };
        let mut walk = RotationWalk { cos, sin, step_cos, step_sin, current };
        walk.jump(self, position);
        walk
    }
}

impl Clone for Rotation {
    fn clone(&self) -> Self {
        let Self { cos, sin, n_pairs, pairing } = self;
        Self { cos: cos.clone(), sin: sin.clone(), n_pairs: *n_pairs, pairing: *pairing }
    }

    /// What was allocated serves again.
    fn clone_from(&mut self, other: &Self) {
        self.cos.clone_from(&other.cos);
        self.sin.clone_from(&other.sin);
        (self.n_pairs, self.pairing) = (other.n_pairs, other.pairing);
    }
}

impl Clone for RotationWalk {
    fn clone(&self) -> Self {
        let Self { cos, sin, step_cos, step_sin, current } = self;
        Self {
            cos: cos.clone(),
            sin: sin.clone(),
            step_cos: step_cos.clone(),
            step_sin: step_sin.clone(),
            current: current.clone(),
        }
    }

    /// What was allocated serves again.
    fn clone_from(&mut self, other: &Self) {
        self.cos.clone_from(&other.cos);
        self.sin.clone_from(&other.sin);
        self.step_cos.clone_from(&other.step_cos);
        self.step_sin.clone_from(&other.step_sin);
        self.current.clone_from(&other.current);
    }
}

impl RotationWalk {
    /// Goes to R(−`position`) at once; `rope` is that of the walk, and so is the step.
    pub fn jump(&mut self, rope: &Rope, position: i64) {
        for (i, angle) in rope.angles(-position).enumerate() {
            (self.sin[i], self.cos[i]) = angle.sin_cos();
            (self.current.sin[i], self.current.cos[i]) = (self.sin[i] as f32, self.cos[i] as f32);
        }
    }

    /// The rotation of the current position.
    #[must_use]
    pub fn rotation(&self) -> &Rotation {
        &self.current
    }

    /// Goes on to the next position.
    #[inline(always)]
    pub fn advance(&mut self) {
        let n = self.cos.len();
        let (cos, sin) = (&mut self.cos[..n], &mut self.sin[..n]);
        let (step_cos, step_sin) = (&self.step_cos[..n], &self.step_sin[..n]);
        let Rotation { cos: cos_f32, sin: sin_f32, .. } = &mut self.current;
        let (cos_f32, sin_f32) = (&mut cos_f32[..n], &mut sin_f32[..n]);
        for i in 0..n {
            let (c, s) =
                (cos[i] * step_cos[i] - sin[i] * step_sin[i], sin[i] * step_cos[i] + cos[i] * step_sin[i]);
            (cos[i], sin[i]) = (c, s);
            cos_f32[i] = c as f32;
            sin_f32[i] = s as f32;
        }
    }
}

impl Rotation {
    /// Cosines and sines, one a pair, padded to whole vectors of sixteen with pairs that do not turn.
    #[inline(always)]
    pub(crate) fn padded(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairings_by_name() {
        for pairing in Pairing::ALL {
            assert_eq!(pairing.name().parse(), Ok(pairing));
        }
        let error = "HalfSplit".parse::<Pairing>().unwrap_err();
        assert_eq!(error.to_string(), "pairing \"HalfSplit\", expected \"half_split\" or \"interleaved\"");
    }

    #[test]
    fn rotation_matches_the_complex_product() {
        for pairing in Pairing::ALL {
            let rope = Rope::new(pairing, 4, vec![1.0, 0.01]).unwrap();
            let mut x = [0.3, -1.2, 2.0, 0.7, 9.0];
            let before = x;
            rope.rotation(37).apply(&mut x);
            let pairs = match pairing {
                Pairing::HalfSplit => [(0, 2), (1, 3)],
                Pairing::Interleaved => [(0, 1), (2, 3)],
            };
            for ((a, b), f) in pairs.into_iter().zip([1.0f64, 0.01]) {
                let (s, c) = (37.0 * f).sin_cos();
                let expected_a = f64::from(before[a]) * c - f64::from(before[b]) * s;
                let expected_b = f64::from(before[b]) * c + f64::from(before[a]) * s;
                assert!((f64::from(x[a]) - expected_a).abs() < 1e-6);
                assert!((f64::from(x[b]) - expected_b).abs() < 1e-6);
            }
            assert_eq!(x[4], 9.0, "components beyond rotary_dim stay");
        }
    }

    #[test]
    fn inverse_undoes_rotation_far_out() {
        let rope = Rope::new(Pairing::HalfSplit, 8, vec![1.0, 0.3, 0.1, 1e-4]).unwrap();
        let mut x: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).collect();
        let before = x.clone();
        rope.rotation(1_000_003).apply(&mut x);
        rope.rotation(-1_000_003).apply(&mut x);
        for (a, b) in x.iter().zip(&before) {
            assert!((a - b).abs() < 1e-5);
        }
    }

    #[test]
    fn walking_is_as_good_as_jumping() {
        let rope = Rope::new(Pairing::Interleaved, 6, vec![1.0, 0.3, 1e-3]).unwrap();
        let mut walk = rope.walk_back(100_020, 32);
        for step in 0..2000 {
            let expected = rope.rotation(-(100_020 + 32 * step));
            let (mut a, mut b) = ([1.0, -2.0, 0.5, 3.0, 0.1, 1.0f32], [1.0, -2.0, 0.5, 3.0, 0.1, 1.0f32]);
            walk.rotation().apply(&mut a);
            expected.apply(&mut b);
            assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-6), "step {step}: {a:?} {b:?}");
            walk.advance();
        }
    }

    #[test]
    fn bad_descriptions_are_refused() {
        assert!(Rope::new(Pairing::HalfSplit, 3, vec![1.0]).is_err());
        assert!(Rope::new(Pairing::HalfSplit, 4, vec![1.0]).is_err());
        assert!(Rope::new(Pairing::HalfSplit, 2, vec![f64::NAN]).is_err());
    }
}
