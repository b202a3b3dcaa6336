//! The native half of the Python package `kvlathe`. Tensors come in as torch objects and are read through their
//! pointers; everything else lives in the Rust crates.

mod block;
mod codec;
mod container;
mod error;
mod layer;
mod moments;
mod openmp;
mod page;
mod prefix;
mod preset;
mod tensor;

use pyo3::prelude::*;

/// Version of the library, as Cargo has it.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Names of the instruction sets this machine can run, slowest first, and the one in use.
#[pyfunction]
fn instruction_sets() -> (Vec<&'static str>, &'static str) {
    let all = kvlathe::codec::available_isas().into_iter().map(kvlathe::codec::Isa::name).collect();
    (all, kvlathe::codec::best_isa().name())
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<codec::StreamSetCodec>()?;
    module.add_class::<codec::LowRankCodec>()?;
    module.add_class::<layer::NativeLayer>()?;
    module.add_class::<block::PackedBlock>()?;
    module.add_class::<block::PackedRow>()?;
    module.add_class::<container::Container>()?;
    module.add_class::<container::MappedBytes>()?;
    module.add_class::<moments::Moments>()?;
    module.add_class::<page::NativePageStore>()?;
    module.add_class::<prefix::PrefixScope>()?;
    module.add_class::<prefix::NativePrefixStore>()?;
    module.add_class::<preset::Preset>()?;
    module.add_function(wrap_pyfunction!(container::write_container, module)?)?;
    module.add_function(wrap_pyfunction!(preset::cache_fingerprint, module)?)?;
    module.add_function(wrap_pyfunction!(preset::fingerprint, module)?)?;
    module.add_function(wrap_pyfunction!(openmp::adopt_openmp, module)?)?;
    module.add_function(wrap_pyfunction!(version, module)?)?;
    module.add_function(wrap_pyfunction!(instruction_sets, module)?)?;
    Ok(())
}
