//! Saved caches as Python objects: files mapped and checked, and written.

use std::path::PathBuf;

use kvlathe::cache::Bytes;
use kvlathe::prefix::container::{
    Container as Opened, ContainerError, Contents, Header, Place, SideContents, write,
};
use pyo3::prelude::*;

use crate::block::PackedRow;
use crate::error::to_python;
use crate::preset::side;
use crate::tensor::RawTensor;

/// Bytes that lie in a mapped file, while this object lives.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct MappedBytes(Bytes);

#[pymethods]
impl MappedBytes {
    #[getter]
    fn address(&self) -> usize {
        self.0.as_ptr().addr()
    }

    #[getter]
    fn n_bytes(&self) -> usize {
        self.0.len()
    }
}

/// A saved cache's file, mapped and checked as a whole.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct Container(pub(crate) Opened);

#[pymethods]
impl Container {
    /// Maps and checks a file. Nobody may write to it while anything of it is used.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| Opened::open(path)).map(Self).map_err(to_python)
    }

    /// What the file says of itself.
    fn header_json(&self) -> PyResult<String> {
        let json = self.0.header().to_json().map_err(to_python)?;
        Ok(String::from_utf8_lossy(&json).into_owned())
    }

    /// The tokens' ids, row by row, if they are there.
    fn token_ids(&self) -> Option<Vec<u32>> {
        self.0.token_ids()
    }

    /// The exact first and last tokens of a layer's side, `[batch, heads, n, head_dim]` each.
    fn exact(&self, layer: usize, side_name: &str) -> PyResult<(MappedBytes, MappedBytes)> {
        let place = Place { layer, side: side(side_name)? };
        Ok((MappedBytes(self.0.sinks(place)), MappedBytes(self.0.tail(place))))
    }

    /// The packed blocks of a row, in the file.
    fn blocks(&self, layer: usize, side_name: &str, row: usize) -> PyResult<PackedRow> {
        Ok(PackedRow(self.0.blocks(Place { layer, side: side(side_name)? }, row)))
    }
}

/// Sinks (uint8, flat), each row's blocks, tail (uint8, flat).
type SideGiven<'py> = (Bound<'py, PyAny>, Vec<Bound<'py, PackedRow>>, Bound<'py, PyAny>);

/// Sinks and tail of a side.
type Exact<'py> = [RawTensor<'py>; 2];

fn exact<'py>((sinks, _, tail): &SideGiven<'py>) -> PyResult<Exact<'py>> {
    let raw = |tensor: &Bound<'py, PyAny>| {
        let raw = RawTensor::new(tensor, "exact tokens", 1)?;
        raw.expect_dtype("exact tokens", "uint8")?;
        Ok::<_, PyErr>(raw)
    };
    Ok([raw(sinks)?, raw(tail)?])
}

fn contents<'a>((_, rows, _): &SideGiven<'_>, [sinks, tail]: &'a Exact<'_>) -> PyResult<SideContents<'a>> {
    // SAFETY: `exact` has checked the dtypes; the tensors are arguments of the call that reads them, and only reads.
    let [sinks, tail] = [sinks, tail].map(|raw| unsafe { raw.contiguous::<u8>("exact tokens") });
    let blocks = rows.iter().map(|row| row.get().0.clone()).collect();
    Ok(SideContents { sinks: sinks?, blocks, tail: tail? })
}

/// Layers that the header has a shape for, in order, keys before values.
pub(crate) type LayersGiven<'py> = Vec<(SideGiven<'py>, SideGiven<'py>)>;

/// Lays contents out as in a file and hands them to `go`, which is run while Python goes on.
pub(crate) fn with_contents<T: Send>(
    py: Python<'_>,
    header_json: &str,
    token_ids: Option<&[u32]>,
    layers: &LayersGiven<'_>,
    go: impl FnOnce(&Contents<'_>) -> Result<T, ContainerError> + Send,
) -> PyResult<T> {
    let header = Header::from_json(header_json.as_bytes()).map_err(to_python)?;
    let exact: Vec<[Exact<'_>; 2]> =
        layers.iter().map(|(key, value)| Ok([exact(key)?, exact(value)?])).collect::<PyResult<_>>()?;
    let of_layer = layers
        .iter()
        .zip(&exact)
        .map(|((key, value), [of_key, of_value])| Ok([contents(key, of_key)?, contents(value, of_value)?]));
    let layers = of_layer.collect::<PyResult<Vec<_>>>()?;
    let contents = Contents { header, token_ids, layers };
    py.detach(|| go(&contents)).map_err(to_python)
}

/// Writes a file that `Container.open` reads.
#[pyfunction]
pub(crate) fn write_container(
    py: Python<'_>,
    path: PathBuf,
    header_json: &str,
    token_ids: Option<Vec<u32>>,
    layers: LayersGiven<'_>,
) -> PyResult<()> {
    with_contents(py, header_json, token_ids.as_deref(), &layers, |contents| write(path, contents))
}
