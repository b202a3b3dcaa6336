//! Codecs, tokens and numbers out of the fuzzer's bytes. When the bytes end, everything that follows is zero.

use arbitrary::{Arbitrary, Unstructured};
use half::f16;
use kvlathe::codec::{BLOCK_LENS, Basis, Pairing, Rope, StreamTables, WIDTHS};

/// Numbers that are read before they repeat: enough to be unlike each other, few enough to be found by a fuzzer.
const POOL: usize = 29;

/// The input of a target, read from its front.
pub(crate) struct Source<'a>(Unstructured<'a>);

/// One stream's codec, and its rotation.
pub(crate) struct Stream {
    pub(crate) tables: StreamTables,
    pub(crate) rope: Option<Rope>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Any value of a type.
    pub(crate) fn any<T: Arbitrary<'a> + Default>(&mut self) -> T {
        self.0.arbitrary().unwrap_or_default()
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::from(self.any::<u8>()) % n
    }

    /// One of several.
    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A finite number of ordinary size.
    pub(crate) fn small(&mut self) -> f32 {
        f32::from(self.any::<i8>()) / 32.0
    }

    /// Any finite float16, as presets hold them.
    fn float16(&mut self) -> f32 {
        let number = f16::from_bits(self.any());
        if number.is_finite() { number.to_f32() } else { 0.0 }
    }

    /// A number as activations have it, or as they should not: large, tiny, NaN, infinite.
    pub(crate) fn activation(&mut self) -> f32 {
        match self.below(8) {
            0 => f32::from_bits(self.any()),
            1 => 1e4 * self.small(),
            2 => 1e17 * self.small().clamp(-1.0, 1.0),
            3 => 1e-38 * self.small(),
            _ => self.small(),
        }
    }

    /// `n` values, of which the first few are `one`'s and the others repeat them.
    pub(crate) fn repeat<T: Copy>(&mut self, n: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let pool: Vec<T> = (0..POOL.min(n)).map(|_| one(self)).collect();
        (0..n).map(|i| pool[i % POOL]).collect()
    }

    /// A basis: near the identity as calibrated ones are, or anything that a preset may hold.
    pub(crate) fn basis(&mut self, d: usize, is_tame: bool) -> Basis {
        let wild = !is_tame && self.any::<bool>();
        let mut synthesis = self.repeat(d * d, |s| if wild { s.float16() } else { s.small() / 32.0 });
        let scale = if is_tame { 1.0 } else { self.one_of(&[1.0, 0.0, 1e-4, 100.0]) };
        for i in 0..d {
            synthesis[i * d + i] += scale;
        }
        let widths = match self.below(8) {
            at @ 0..6 => vec![WIDTHS[at]; d],
            _ => self.repeat(d, |s| s.one_of(&WIDTHS)),
        };
        if is_tame {
            // As calibration gives it: about the same distortion from each coded coefficient.
            for (i, value) in synthesis.iter_mut().enumerate() {
                let width = widths[i % d];
                *value *= 0.2 / width.step();
            }
        }
        Basis {
            mean: self.repeat(d, |s| if wild { s.float16() } else { s.small() / 4.0 }),
            synthesis,
            importance: self.repeat(d, |s| if wild { s.float16().abs() } else { s.small().abs() }),
            widths,
        }
    }

    /// A rotation of vectors with `d` components, or none.
    pub(crate) fn rope(&mut self, d: usize) -> Option<Rope> {
        let pairs = self.below(d / 2 + 1);
        let pairing = self.one_of(&Pairing::ALL);
        let fastest = self.one_of(&[1.0, 0.01, 3.0]);
        let frequencies = (0..pairs).map(|i| fastest * 0.7f64.powi(i as i32)).collect();
        Rope::new(pairing, 2 * pairs, frequencies).ok()
    }

    /// A stream's codec, if the codec takes it.
    pub(crate) fn stream(&mut self) -> Option<Stream> {
        let d = self.one_of(&[1, 2, 3, 5, 8, 12, 16, 17, 24, 32]);
        // Long blocks take long, and are no different.
        let block_len = if self.below(8) > 0 { self.one_of(&[8, 16]) } else { self.one_of(&BLOCK_LENS) };
        let rope = self.rope(d);
        let basis = self.basis(d, false);
        let tables = StreamTables::new(&basis, rope.as_ref(), block_len).ok()?;
        Some(Stream { tables, rope })
    }
}
