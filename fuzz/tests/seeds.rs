//! Every target on its seeds, and on a fixed number of damaged ones: the part of fuzzing that each change goes through.

use std::fs;
use std::path::Path;

use kvlathe_fuzz::Target;

/// Damaged seeds a target. More with `KVLATHE_FUZZ_RUNS`.
const RUNS: usize = 3000;
/// Longest input, in bytes.
const MOST_BYTES: usize = 1 << 13;

/// xorshift64*: the same inputs everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    /// A few changes: a byte, a piece left out, put in, or put elsewhere.
    fn damage(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let (at, len) = (self.below(bytes.len()), 1 + self.below(16));
            let end = (at + len).min(bytes.len());
            match self.below(5) {
                0 | 1 if !bytes.is_empty() => bytes[at] = self.below(256) as u8,
                2 => drop(bytes.drain(at..end)),
                3 => {
                    let from = self.below(other.len());
                    let piece = &other[from..(from + len).min(other.len())];
                    bytes.splice(at..at, piece.iter().copied());
                }
                _ => bytes.extend_from_within(at..end),
            }
        }
        bytes.truncate(MOST_BYTES);
    }
}

fn replay(name: &str) {
    let target = Target::named(name).expect("a target");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    files.sort();
    let seeds: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).expect("a readable seed")).collect();
    assert!(!seeds.is_empty(), "{} has no seeds", folder.display());
    for (seed, file) in seeds.iter().zip(&files) {
        // A test prints only when it fails: then the last line names the culprit.
        println!("{}", file.display());
        (target.run)(seed);
    }
    let runs = std::env::var("KVLATHE_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(RUNS);
    let mut random = Random(0x6b76_6c61_7468_6521);
    for run in 0..runs {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        random.damage(&mut bytes, other);
        let result = std::panic::catch_unwind(|| (target.run)(&bytes));
        assert!(result.is_ok(), "run {run}; keep this as a file of {}: {}", folder.display(), hex(&bytes));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn attention() {
    replay("attention");
}

#[test]
fn container() {
    replay("container");
}

#[test]
fn import() {
    replay("import");
}

#[test]
fn layer_cache() {
    replay("layer_cache");
}

#[test]
fn model_config() {
    replay("model_config");
}

#[test]
fn packed_block() {
    replay("packed_block");
}

#[test]
fn preset_json() {
    replay("preset_json");
}

#[test]
fn preset_safetensors() {
    replay("preset_safetensors");
}
