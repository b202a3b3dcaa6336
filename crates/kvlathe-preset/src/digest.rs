//! The digest of a preset: what packed blocks and their meaning depend on, hashed. `docs/preset_format.md` specifies it.

use kvlathe_codec::{Digest, Pairing, Rope, Side};
use sha2::{Digest as _, Sha256};

use crate::rounding::round;
use crate::{BLOCK_FORMAT, Preset, StreamPreset};

/// What is hashed first, so that no other hash of the same numbers is taken for a digest.
const TAG: &[u8] = b"kvlathe preset digest";

impl Preset {
    /// SHA-256 of all that packed blocks of this preset depend on: [`BLOCK_FORMAT`], sizes, sinks, rotations, and the
    /// means, bases, importances and widths of all streams, [as a file has them](Self::rounded). Presets of equal digests
    /// pack equal blocks and read one another's.
    ///
    /// Names, dates, records, fingerprints, the shared `U` and the version of the file are no part of it. `None` for a
    /// seed preset, which has no streams. It takes a pass over all arrays: some tens of milliseconds for a large model.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        let lathe = self.lathe()?;
        let mut hash = Hash(Sha256::new());
        hash.0.update(TAG);
        hash.count(BLOCK_FORMAT as usize);
        for size in [self.meta.n_layers, lathe.n_kv_heads, self.meta.head_dim, lathe.block_len, lathe.n_sinks]
        {
            hash.count(size);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            // The rotation itself: its place in the list of rotations means nothing.
            hash.rope(self.rope(index));
            for side in Side::ALL {
                let streams = &layer.side(side).streams;
                hash.count(streams.len());
                streams.iter().for_each(|stream| hash.stream(stream));
            }
        }
        Some(Digest::from(<[u8; 32]>::from(hash.0.finalize())))
    }
}

/// Everything little-endian, and every array after its length.
struct Hash(Sha256);

impl Hash {
    fn count(&mut self, count: usize) {
        self.0.update((count as u64).to_le_bytes());
    }

    fn rope(&mut self, rope: Option<&Rope>) {
        let Some(rope) = rope else { return self.count(0) };
        self.count(match rope.pairing() {
            Pairing::HalfSplit => 1,
            Pairing::Interleaved => 2,
        });
        self.count(rope.rotary_dim());
        self.count(rope.inv_freq().len());
        rope.inv_freq().iter().for_each(|frequency| self.0.update(frequency.to_le_bytes()));
    }

    fn stream(&mut self, stream: &StreamPreset) {
        self.floats(&round(&stream.mean));
        self.floats(&round(&stream.basis));
        self.floats(&stream.importance);
        self.count(stream.widths.len());
        self.0.update(&stream.widths);
    }

    fn floats(&mut self, values: &[f32]) {
        self.count(values.len());
        // One update an array: millions of four bytes each would take several times as long.
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.update(bytes);
    }
}
