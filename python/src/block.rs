//! Packed blocks as Python objects: out of a layer or a file without copying, and in again from any tensor's memory.

use kvlathe::cache::{Block, Bytes};
use kvlathe::codec::{ParseNameError, StreamId};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::error::exception;
use crate::tensor::RawTensor;

/// One packed block: `block_len` tokens of a row, all KV heads of one side.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct PackedBlock(pub(crate) Block);

/// The memory of a torch tensor, which stays while blocks are read from it.
struct TensorMemory {
    _tensor: Py<PyAny>,
    address: usize,
    n_bytes: usize,
}

impl AsRef<[u8]> for TensorMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: so many bytes lie there while the tensor lives, which is held; whoever makes a `PackedBlock` promises
        // (it is documented) not to write to it or to resize it.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.n_bytes) }
    }
}

fn named<T>(parsed: Result<T, ParseNameError>) -> PyResult<T> {
    parsed.map_err(|error| exception("BlockError", error.to_string()))
}

#[pymethods]
impl PackedBlock {
    /// `data`: contiguous uint8 `[n_bytes]`, read where it lies for as long as anybody needs the block.
    #[new]
    fn new(
        digest: &str,
        layer: usize,
        side: &str,
        first_position: usize,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let id = StreamId { digest: named(digest.parse())?, layer, side: named(side.parse())? };
        let raw = RawTensor::new(data, "a block's bytes", 1)?;
        raw.expect_dtype("a block's bytes", "uint8")?;
        let (address, n_bytes) = (raw.address(), raw.shape[0]);
        let bytes = match n_bytes {
            0 => Bytes::new(),
            _ => Bytes::from_owner(TensorMemory { _tensor: data.clone().unbind(), address, n_bytes }),
        };
        Ok(Self(Block { id, first_position, bytes }))
    }

    /// Digest of the preset that packed it, 64 hex digits.
    #[getter]
    fn digest(&self) -> String {
        self.0.id.digest.to_string()
    }

    #[getter]
    fn layer(&self) -> usize {
        self.0.id.layer
    }

    /// "key" or "value".
    #[getter]
    fn side(&self) -> &'static str {
        self.0.id.side.name()
    }

    /// Position of its first slot.
    #[getter]
    fn first_position(&self) -> usize {
        self.0.first_position
    }

    /// Where its bytes lie, while this object lives.
    #[getter]
    fn address(&self) -> usize {
        self.0.bytes.as_ptr().addr()
    }

    #[getter]
    fn n_bytes(&self) -> usize {
        self.0.bytes.len()
    }
}

/// A row's packed blocks, oldest first: thousands of them are one object.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct PackedRow(pub(crate) Vec<Block>);

#[pymethods]
impl PackedRow {
    #[new]
    fn new(blocks: Vec<Bound<'_, PackedBlock>>) -> Self {
        Self(blocks.iter().map(|block| block.get().0.clone()).collect())
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Those of several rows, one after the other.
    #[staticmethod]
    fn joined(rows: Vec<Bound<'_, Self>>) -> Self {
        Self(rows.iter().flat_map(|row| row.get().0.iter().cloned()).collect())
    }

    /// Some of them, as far as they are there.
    fn part(&self, start: usize, stop: usize) -> Self {
        let stop = stop.min(self.0.len());
        Self(self.0.get(start..stop).unwrap_or_default().to_vec())
    }

    /// One of them.
    fn block(&self, index: usize) -> PyResult<PackedBlock> {
        let block = self.0.get(index).cloned().map(PackedBlock);
        block.ok_or_else(|| PyIndexError::new_err(format!("block {index} of {}", self.0.len())))
    }
}
