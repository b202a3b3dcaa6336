//! Fuzz targets: whatever reads bytes that somebody else wrote, and a layer's cache as a state machine.
//!
//! A target is a function of bytes that panics when something stated somewhere is not so. Three things run it:
//!
//! * `cargo test`: all seeds of `seeds/`, and a fixed number of damaged ones (`tests/seeds.rs`);
//! * `make fuzz TARGET=… SECONDS=…`: libFuzzer, guided by coverage, with AddressSanitizer, overflow checks and debug
//!   assertions (`src/main.rs`);
//! * `make asan`: the first, with AddressSanitizer.
//!
//! `docs/robustness.md` says what has been run, and what it found.

pub mod allocation;
mod attention;
mod container;
mod import;
mod layer_cache;
mod model_config;
mod packed_block;
mod preset;
mod preset_json;
mod preset_safetensors;
mod small_layer;
mod source;

pub use preset::most_bytes_for;

/// Something that is fuzzed.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of its module and of its folder of seeds.
    pub name: &'static str,
    /// Panics when it finds something.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 8] = [
    Target { name: "attention", run: attention::run },
    Target { name: "container", run: container::run },
    Target { name: "import", run: import::run },
    Target { name: "layer_cache", run: layer_cache::run },
    Target { name: "model_config", run: model_config::run },
    Target { name: "packed_block", run: packed_block::run },
    Target { name: "preset_json", run: preset_json::run },
    Target { name: "preset_safetensors", run: preset_safetensors::run },
];

impl Target {
    /// The target of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        TARGETS.into_iter().find(|target| target.name == name)
    }
}
