//! Stores of prefixes as Python objects. All calls wait without holding the interpreter.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use kvlathe::cache::Bytes;
use kvlathe::codec::Digest;
use kvlathe::prefix::blocking::PrefixStore;
use kvlathe::prefix::container::to_bytes;
use kvlathe::prefix::store::{Options, Wanted};
use kvlathe::prefix::{Chunk, ChunkName, Dependencies, Part, Scope};
use pyo3::prelude::*;

use crate::container::{Container, LayersGiven, with_contents};
use crate::error::{exception, to_python};

/// What a prefix depends on beside its tokens.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct PrefixScope(pub(crate) Scope);

#[pymethods]
impl PrefixScope {
    #[new]
    fn new(digest: &str, weights: &str, extra: &[u8], chunk_len: usize, secret: &[u8]) -> PyResult<Self> {
        let preset: Digest = digest.parse().map_err(|error| exception("PresetError", format!("{error}")))?;
        if chunk_len == 0 {
            return Err(exception("ShapeError", "chunks of 0 tokens".to_owned()));
        }
        Ok(Self(Scope::new(&Dependencies { preset, weights, extra, chunk_len }, secret)))
    }

    /// The keys of all whole chunks.
    fn keys(&self, token_ids: Vec<u32>) -> Vec<String> {
        self.0.keys(&token_ids).iter().map(ToString::to_string).collect()
    }
}

/// A chunk's number, and whether its layers with windows are meant, not those of full attention.
type ChunkPart = (usize, bool);

fn part(is_window: bool) -> Part {
    if is_window { Part::Window } else { Part::Full }
}

/// What lies in a store: its name's parts (scope, key, end, is_window), bytes, seconds since 1970 of its last use.
type Listed = (String, String, usize, bool, u64, f64);

/// A store of chunks under a URL.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct NativePrefixStore(pub(crate) Arc<PrefixStore>);

#[pymethods]
impl NativePrefixStore {
    #[new]
    fn new(
        py: Python<'_>,
        url: &str,
        timeout_s: f64,
        max_bytes: Option<u64>,
        max_age_s: Option<f64>,
    ) -> PyResult<Self> {
        let seconds = |name: &str, given: f64| {
            Duration::try_from_secs_f64(given).map_err(|error| {
                exception("PrefixStoreError", format!("{name} is {given}, expected seconds ({error})"))
            })
        };
        let max_age = max_age_s.map(|given| seconds("max_age_s", given)).transpose()?;
        let options = Options { timeout: seconds("timeout_s", timeout_s)?, max_bytes, max_age };
        let store = py.detach(|| PrefixStore::open(url, options)).map_err(to_python)?;
        Ok(Self(Arc::new(store)))
    }

    /// Without credentials.
    #[getter]
    fn url(&self) -> &str {
        self.0.url()
    }

    /// Of the longest stored prefix: its chunks; full layers of all, windows of the last ones; what went wrong.
    #[expect(clippy::type_complexity, reason = "a tuple for Python")]
    fn find(
        &self,
        py: Python<'_>,
        scope: &PrefixScope,
        token_ids: Vec<u32>,
        full: bool,
        window: Option<usize>,
    ) -> PyResult<(usize, Vec<Container>, Vec<Container>, Option<PyErr>)> {
        let found = py.detach(|| self.0.find(&Chunk::all(&scope.0, &token_ids), Wanted { full, window }));
        let found = found.map_err(to_python)?;
        let containers = |of: Vec<_>| of.into_iter().map(Container).collect();
        let trouble = found.trouble.map(to_python);
        Ok((found.n_chunks, containers(found.full), containers(found.window), trouble))
    }

    /// Which of these parts of a sequence are not kept.
    fn missing(
        &self,
        py: Python<'_>,
        scope: &PrefixScope,
        token_ids: Vec<u32>,
        parts: Vec<ChunkPart>,
    ) -> PyResult<Vec<bool>> {
        let names = names(&scope.0, &token_ids, &parts)?;
        py.detach(|| self.0.missing(&names)).map_err(to_python)
    }

    /// Keeps parts of a sequence, each with its header and layers. Bytes that were written.
    fn put(
        &self,
        py: Python<'_>,
        scope: &PrefixScope,
        token_ids: Vec<u32>,
        parts: Vec<(ChunkPart, String, LayersGiven<'_>)>,
    ) -> PyResult<u64> {
        let chunks = Chunk::all(&scope.0, &token_ids);
        let mut objects: Vec<(ChunkName, Bytes)> = Vec::with_capacity(parts.len());
        for ((index, is_window), header, layers) in &parts {
            let name = name(&chunks, *index, *is_window)?;
            let ids = chunks[*index].token_ids;
            objects.push((name, with_contents(py, header, Some(ids), layers, to_bytes)?));
        }
        let n_bytes = objects.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        py.detach(|| self.0.put(objects)).map_err(to_python)?;
        Ok(n_bytes)
    }

    /// Notes that these parts of a sequence were used.
    fn touch(
        &self,
        py: Python<'_>,
        scope: &PrefixScope,
        token_ids: Vec<u32>,
        parts: Vec<ChunkPart>,
    ) -> PyResult<()> {
        let names = names(&scope.0, &token_ids, &parts)?;
        py.detach(|| self.0.touch(&names)).map_err(to_python)
    }

    /// All chunks that are kept.
    fn list(&self, py: Python<'_>) -> PyResult<Vec<Listed>> {
        let found = py.detach(|| self.0.list()).map_err(to_python)?;
        let listed = found.into_iter().map(|(name, entry)| {
            let used_at = entry.used_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            (name.scope, name.key, name.end, name.part == Part::Window, entry.n_bytes, used_at)
        });
        Ok(listed.collect())
    }

    /// How often a prefix of a scope was found; None where nobody counts.
    fn hits(&self, py: Python<'_>, scope: &str) -> PyResult<Option<u64>> {
        py.detach(|| self.0.hits(scope)).map_err(to_python)
    }

    /// One object, checked; None if it is gone.
    fn read(
        &self,
        py: Python<'_>,
        scope: String,
        key: String,
        end: usize,
        is_window: bool,
    ) -> PyResult<Option<Container>> {
        let name = ChunkName { scope, key, end, part: part(is_window) };
        Ok(py.detach(|| self.0.read(&name)).map_err(to_python)?.map(Container))
    }

    /// Removes what the limits do not allow: objects, bytes.
    fn evict(&self, py: Python<'_>) -> PyResult<(usize, u64)> {
        let evicted = py.detach(|| self.0.evict()).map_err(to_python)?;
        Ok((evicted.n_objects, evicted.n_bytes))
    }
}

fn names(scope: &Scope, token_ids: &[u32], parts: &[ChunkPart]) -> PyResult<Vec<ChunkName>> {
    let chunks = Chunk::all(scope, token_ids);
    parts.iter().map(|&(index, is_window)| name(&chunks, index, is_window)).collect()
}

fn name(chunks: &[Chunk<'_>], index: usize, is_window: bool) -> PyResult<ChunkName> {
    let chunk = chunks.get(index).ok_or_else(|| {
        exception("ShapeError", format!("chunk {index} of a sequence that has {}", chunks.len()))
    })?;
    Ok(chunk.name(part(is_window)))
}
