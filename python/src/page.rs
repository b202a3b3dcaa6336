//! Pages of servers as Python objects: coded, kept, found and expanded. All calls work without holding the interpreter.

use kvlathe::cache::Bytes;
use kvlathe::codec::Side;
use kvlathe::prefix::container::Container;
use kvlathe::prefix::{ChunkKey, ChunkName, PageCodec, PageOrigin, Part, Scope};
use pyo3::prelude::*;

use crate::codec::StreamSetCodec;
use crate::error::{exception, to_python};
use crate::prefix::{NativePrefixStore, PrefixScope};
use crate::tensor::{RawTensor, with_element};

/// Keys and values of a page, `[numbers]` each.
type PageGiven<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Codecs of a layer's keys and values.
type LayerGiven<'py> = (Bound<'py, StreamSetCodec>, Bound<'py, StreamSetCodec>);

/// A server's pages in a store, of one model, preset and tenant.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct NativePageStore {
    store: Py<NativePrefixStore>,
    scope: Scope,
    codec: PageCodec,
    model: String,
    weights: String,
}

impl NativePageStore {
    fn key(&self, server_key: &[u8]) -> ChunkKey {
        self.scope.page_key(server_key)
    }

    fn name(&self, server_key: &[u8], first_position: usize) -> ChunkName {
        let end = first_position.saturating_add(self.codec.n_tokens());
        ChunkName { scope: self.scope.name(), key: self.key(server_key).to_string(), end, part: Part::Full }
    }
}

#[pymethods]
impl NativePageStore {
    #[new]
    fn new(
        store: Py<NativePrefixStore>,
        scope: &PrefixScope,
        layers: Vec<LayerGiven<'_>>,
        n_sinks: usize,
        model: String,
        weights: String,
    ) -> PyResult<Self> {
        let sets = layers.iter().map(|(key, value)| [key, value].map(|set| set.get().0.clone())).collect();
        let codec = PageCodec::new(sets, n_sinks, scope.0.chunk_len()).map_err(to_python)?;
        Ok(Self { store, scope: scope.0.clone(), codec, model, weights })
    }

    /// Numbers of a page's keys and of its values.
    #[getter]
    fn n_numbers(&self) -> (usize, usize) {
        (self.codec.n_numbers(Side::Key), self.codec.n_numbers(Side::Value))
    }

    /// Which of these pages, by the server's keys and the positions of their first tokens, are not kept.
    fn missing(&self, py: Python<'_>, pages: Vec<(Vec<u8>, usize)>) -> PyResult<Vec<bool>> {
        let names: Vec<ChunkName> = pages.iter().map(|(key, first)| self.name(key, *first)).collect();
        py.detach(|| self.store.get().0.missing(&names)).map_err(to_python)
    }

    /// A page's container: keys and values `[layers, heads, tokens, head_dim]`, contiguous.
    fn encode(
        &self,
        py: Python<'_>,
        server_key: Vec<u8>,
        first_position: usize,
        page: PageGiven<'_>,
        n_threads: usize,
    ) -> PyResult<EncodedPage> {
        let [keys, values] = tensors(&page)?;
        let name = self.name(&server_key, first_position);
        let origin = PageOrigin { chunk_key: &name.key, model: &self.model, weights: &self.weights };
        let bytes = with_element!(keys.dtype()?, E => {
            // SAFETY: `tensors` has checked that both have one dtype, and it is E; they are arguments of this call, and only
            // read.
            let page = unsafe { [keys.contiguous::<E>("keys")?, values.contiguous::<E>("values")?] };
            py.detach(|| self.codec.encode(page, first_position, origin, n_threads))
        });
        Ok(EncodedPage { name, bytes: bytes.map_err(to_python)? })
    }

    /// Keeps pages, several at a time.
    fn put(&self, py: Python<'_>, pages: Vec<Py<EncodedPage>>) -> PyResult<()> {
        let objects = pages.iter().map(|page| (page.get().name.clone(), page.get().bytes.clone())).collect();
        py.detach(|| self.store.get().0.put(objects)).map_err(to_python)
    }

    /// Writes a page that is kept to keys and values, `[layers, heads, tokens, head_dim]` contiguous. Bytes that were read;
    /// None if it is not there.
    fn load(
        &self,
        py: Python<'_>,
        server_key: Vec<u8>,
        first_position: usize,
        out: PageGiven<'_>,
        n_threads: usize,
    ) -> PyResult<Option<usize>> {
        let name = self.name(&server_key, first_position);
        let found = py.detach(|| self.store.get().0.page(&name)).map_err(to_python)?;
        let Some(page) = found else { return Ok(None) };
        self.expand(py, &page, &out, n_threads)?;
        Ok(Some(page.n_bytes()))
    }

    /// As `load`, of a page that was encoded just now.
    fn decode(
        &self,
        py: Python<'_>,
        page: &EncodedPage,
        out: PageGiven<'_>,
        n_threads: usize,
    ) -> PyResult<()> {
        let page = Container::from_bytes(page.bytes.clone()).map_err(to_python)?;
        self.expand(py, &page, &out, n_threads)
    }

    /// Notes that these pages were used, where eviction goes by that.
    fn touch(&self, py: Python<'_>, pages: Vec<(Vec<u8>, usize)>) -> PyResult<()> {
        let names: Vec<ChunkName> = pages.iter().map(|(key, first)| self.name(key, *first)).collect();
        py.detach(|| self.store.get().0.touch(&names)).map_err(to_python)
    }
}

impl NativePageStore {
    fn expand(
        &self,
        py: Python<'_>,
        page: &Container,
        out: &PageGiven<'_>,
        n_threads: usize,
    ) -> PyResult<()> {
        let [keys, values] = tensors(out)?;
        with_element!(keys.dtype()?, E => {
            // SAFETY: as in `encode`; the caller made both tensors to be written, and nobody else has them.
            let out = unsafe { [keys.slice_mut::<E>("keys")?, values.slice_mut::<E>("values")?] };
            py.detach(|| self.codec.decode(page, out, n_threads))
        })
        .map_err(to_python)
    }
}

fn tensors<'py>((keys, values): &PageGiven<'py>) -> PyResult<[RawTensor<'py>; 2]> {
    let [keys, values] = [RawTensor::new(keys, "keys", 4)?, RawTensor::new(values, "values", 4)?];
    if keys.dtype()? != values.dtype()? {
        return Err(exception("DtypeError", "keys and values of a page have different dtypes".to_owned()));
    }
    Ok([keys, values])
}

/// A page as it is kept.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct EncodedPage {
    name: ChunkName,
    bytes: Bytes,
}

#[pymethods]
impl EncodedPage {
    #[getter]
    fn n_bytes(&self) -> usize {
        self.bytes.len()
    }
}
