//! Rust errors → the exception classes of `kvlathe.errors`.

use kvlathe::Error;
use kvlathe::cache::CacheError;
use kvlathe::calib::CalibError;
use kvlathe::codec::CodecError;
use kvlathe::prefix::StoreError;
use kvlathe::prefix::container::ContainerError;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// An exception of the class `name` in `kvlathe.errors`.
pub(crate) fn exception(name: &str, message: String) -> PyErr {
    Python::attach(|py| {
        let class = py.import("kvlathe.errors").and_then(|module| module.getattr(name));
        match class.and_then(|class| Ok(class.cast_into::<PyType>()?)) {
            Ok(class) => PyErr::from_type(class, message),
            Err(error) => error,
        }
    })
}

/// The exception that tells a Python user of `error`.
pub(crate) fn to_python(error: impl Into<Error>) -> PyErr {
    let error = error.into();
    let name = match &error {
        Error::Preset(_) | Error::SeedPreset { .. } => "PresetError",
        Error::Container(ContainerError::OutOfMemory { .. }) => "ResourceError",
        Error::Container(_) => "ContainerError",
        Error::Store(StoreError::Contents(ContainerError::OutOfMemory { .. })) => "ResourceError",
        Error::Store(_) => "PrefixStoreError",
        Error::Rate { .. } => "BudgetError",
        Error::FactorCount { .. } | Error::Factor { .. } => "CalibrationError",
        Error::Codec(inner)
        | Error::Cache(CacheError::Codec(inner))
        | Error::Calib(CalibError::Codec(inner)) => match inner {
            CodecError::BadActivation { .. } | CodecError::NonFiniteParameter { .. } => "NonFiniteError",
            CodecError::OutOfMemory { .. } => "ResourceError",
            CodecError::Range { .. } | CodecError::Length { .. } => "ShapeError",
            _ => "PresetError",
        },
        Error::Cache(CacheError::Threads { .. }) => "ResourceError",
        Error::Cache(CacheError::WrongBlock { .. } | CacheError::Unnamed) => "BlockError",
        Error::Cache(CacheError::NotEmpty { .. }) => "CacheStateError",
        Error::Cache(_) => "ShapeError",
        Error::Calib(CalibError::NonFinite { .. }) => "NonFiniteError",
        Error::Calib(CalibError::Length { .. } | CalibError::Index { .. }) => "ShapeError",
        _ => "CalibrationError",
    };
    exception(name, error.to_string())
}
