//! Pages of servers as Python objects: coded, kept, found and expanded. All calls work without holding the interpreter.

use std::collections::HashSet;
use std::sync::Arc;

use kvlathe::codec::Element;
use kvlathe::prefix::page::{PageCodec, PageMemory, PageName, PageSizes, PageStore};
use pyo3::prelude::*;

use crate::codec::StreamSetCodec;
use crate::error::{exception, to_python};
use crate::prefix::{NativePrefixStore, PrefixScope};
use crate::tensor::{Dtype, RawTensor, with_element};

/// Codecs of a layer's keys and values.
type LayerGiven<'py> = (Bound<'py, StreamSetCodec>, Bound<'py, StreamSetCodec>);

/// The server's key of a page, and the position of its first token.
type NameGiven = (Vec<u8>, usize);

fn names(pages: Vec<NameGiven>) -> Vec<PageName> {
    pages.into_iter().map(|(key, first_position)| PageName { key, first_position }).collect()
}

/// A server's pages in a store, of one model, preset and tenant.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct NativePageStore {
    pages: PageStore,
    dtype: Dtype,
}

#[pymethods]
impl NativePageStore {
    /// `sizes` are layers, workers, a worker's heads, blocks, their tokens, head_dim; `strides` those of layers, workers,
    /// heads and blocks; `places` are `[2, block_tokens, head_dim]` of a head's block.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        store: &NativePrefixStore,
        scope: &PrefixScope,
        layers: Vec<LayerGiven<'_>>,
        n_sinks: usize,
        sizes: [usize; 6],
        strides: [usize; 4],
        places: Vec<usize>,
        dtype: &str,
        model: String,
        weights: String,
    ) -> PyResult<Self> {
        let sets = layers.iter().map(|(key, value)| [key, value].map(|set| set.get().0.clone())).collect();
        let [n_layers, n_workers, n_heads, n_blocks, block_tokens, head_dim] = sizes;
        let sizes = PageSizes { n_layers, n_workers, n_heads, n_blocks, block_tokens, head_dim };
        let codec = PageCodec::new(sets, n_sinks, sizes.n_tokens()).map_err(to_python)?;
        let memory = PageMemory::new(sizes, strides, places).map_err(to_python)?;
        let (store, scope) = (Arc::clone(&store.0), scope.0.clone());
        let pages = PageStore::new(store, scope, codec, memory, (model, weights)).map_err(to_python)?;
        Ok(Self { pages, dtype: Dtype::from_name(dtype)? })
    }

    /// Which of these pages are not kept.
    fn missing(&self, py: Python<'_>, pages: Vec<NameGiven>) -> PyResult<Vec<bool>> {
        let pages = names(pages);
        py.detach(|| self.pages.missing(&pages)).map_err(to_python)
    }

    /// Notes that these pages were used, where eviction goes by that.
    fn touch(&self, py: Python<'_>, pages: Vec<NameGiven>) -> PyResult<()> {
        let pages = names(pages);
        py.detach(|| self.pages.touch(&pages)).map_err(to_python)
    }

    /// Codes pages that lie in rows of `memory`, uint8 `[rows, bytes]`, and keeps them, but for those of which coding
    /// changes a larger share than `most_changed`. Of each: bytes that were written, and the share.
    fn save(
        &self,
        py: Python<'_>,
        pages: Vec<NameGiven>,
        memory: &Bound<'_, PyAny>,
        rows: Vec<usize>,
        most_changed: f64,
        n_threads: usize,
    ) -> PyResult<Vec<(usize, f64)>> {
        let memory = Rows::new(memory, &rows, pages.len())?;
        let pages = names(pages);
        let saved = with_element!(self.dtype, E => {
            // SAFETY: the caller lets nobody write to these rows meanwhile.
            let rows = rows.iter().map(|&row| unsafe { memory.row::<E>(row) }).collect::<PyResult<Vec<_>>>()?;
            py.detach(|| self.pages.save(pages.into_iter().zip(rows).collect(), most_changed, n_threads))
        });
        Ok(saved.map_err(to_python)?.into_iter().map(|page| (page.n_bytes, page.changed)).collect())
    }

    /// Writes pages that are kept to rows of `memory`. Of each: bytes that were read, None if it is not there, or an error.
    fn load(
        &self,
        py: Python<'_>,
        pages: Vec<NameGiven>,
        memory: &Bound<'_, PyAny>,
        rows: Vec<usize>,
        n_threads: usize,
    ) -> PyResult<Vec<(Option<usize>, Option<PyErr>)>> {
        let memory = Rows::new(memory, &rows, pages.len())?;
        let pages = names(pages);
        let loaded = with_element!(self.dtype, E => {
            // SAFETY: the rows are distinct, and the caller lets nobody read or write them meanwhile.
            let rows = rows.iter().map(|&row| unsafe { memory.row_mut::<E>(row) }).collect::<PyResult<Vec<_>>>()?;
            py.detach(|| self.pages.load(pages.into_iter().zip(rows).collect(), n_threads))
        });
        Ok(loaded
            .into_iter()
            .map(|one| one.map_or_else(|error| (None, Some(to_python(error))), |n| (n, None)))
            .collect())
    }
}

/// A server's memory, uint8 `[rows, bytes]`, of which some rows are ours for a while.
struct Rows {
    address: usize,
    n_bytes: usize,
}

impl Rows {
    fn new(memory: &Bound<'_, PyAny>, rows: &[usize], n_pages: usize) -> PyResult<Self> {
        let raw = RawTensor::new(memory, "the server's memory", 2)?;
        raw.expect_dtype("the server's memory", "uint8")?;
        let (n_rows, n_bytes) = (raw.shape[0], raw.shape[1]);
        let distinct: HashSet<usize> = rows.iter().copied().collect();
        if rows.len() != n_pages || distinct.len() != n_pages || rows.iter().any(|&row| row >= n_rows) {
            let message =
                format!("rows {rows:?} for {n_pages} pages, expected as many different ones below {n_rows}");
            return Err(exception("ShapeError", message));
        }
        raw.check_contiguous("the server's memory")?;
        Ok(Self { address: raw.address(), n_bytes })
    }

    fn start<E>(&self, row: usize) -> PyResult<(usize, usize)> {
        let start = self.address + row * self.n_bytes;
        if !start.is_multiple_of(align_of::<E>()) {
            let message = "rows of the server's memory do not begin at multiples of their numbers' size";
            return Err(exception("ShapeError", message.to_owned()));
        }
        Ok((start, self.n_bytes / size_of::<E>()))
    }

    /// # Safety
    /// The tensor lives, and nobody writes to the row, while the slice is used.
    unsafe fn row<'a, E: Element>(&self, row: usize) -> PyResult<&'a [E]> {
        let (start, n) = self.start::<E>(row)?;
        // SAFETY: `new` has checked that the row lies in the tensor, `start` that it is aligned; every pattern of bits is an
        // element; the rest is the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts(start as *const E, n) })
    }

    /// # Safety
    /// The tensor lives, and nobody else uses the row, while the slice is used.
    unsafe fn row_mut<'a, E: Element>(&self, row: usize) -> PyResult<&'a mut [E]> {
        let (start, n) = self.start::<E>(row)?;
        // SAFETY: as in `row`.
        Ok(unsafe { std::slice::from_raw_parts_mut(start as *mut E, n) })
    }
}
