//! libFuzzer on the target that the environment variable `TARGET` names; `make fuzz` calls it.

#![no_main]

use std::sync::LazyLock;

use kvlathe_fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("TARGET").unwrap_or_default();
    Target::named(&name).unwrap_or_else(|| {
        eprintln!("TARGET is {name:?}, expected one of {:?}", TARGETS.map(|target| target.name));
        std::process::exit(2)
    })
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));
