//! The store for code without `async`.

use std::mem;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};

use crate::backend::{Entry, redacted};
use crate::chunk::{Chunk, ChunkName};
use crate::container::Container;
use crate::error::{Result, StoreError};
use crate::store::{Evicted, Found, Options, Wanted};

/// As [`crate::PrefixStore`], each call waiting for its answer. Not for use inside an async runtime.
#[derive(Debug)]
pub struct PrefixStore {
    /// With credentials, hence never shown.
    secret_url: Hidden,
    url: String,
    options: Options,
    alive: Mutex<Arc<Alive>>,
}

struct Hidden(String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// Threads and connections of one process.
#[derive(Debug)]
struct Alive {
    process: u32,
    runtime: Runtime,
    store: crate::PrefixStore,
}

impl Alive {
    fn new(url: &str, options: Options) -> Result<Self> {
        // Transfers and checksums; what blocks has threads of its own.
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).thread_name("kvlathe-prefix").enable_all().build();
        let runtime = runtime.map_err(StoreError::Threads)?;
        let store = runtime.block_on(crate::PrefixStore::open(url, options))?;
        Ok(Self { process: process::id(), runtime, store })
    }
}

impl PrefixStore {
    /// See [`crate::PrefixStore::open`].
    ///
    /// # Errors
    /// As there; and a system that gives no threads.
    pub fn open(url: &str, options: Options) -> Result<Self> {
        let alive = Mutex::new(Arc::new(Alive::new(url, options)?));
        Ok(Self { secret_url: Hidden(url.to_owned()), url: redacted(url), options, alive })
    }

    /// The URL, without credentials.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// See [`crate::PrefixStore::find`].
    ///
    /// # Errors
    /// A forked process that gets no threads or no connection of its own.
    pub fn find(&self, chunks: &[Chunk<'_>], wanted: Wanted) -> Result<Found> {
        let alive = self.alive()?;
        Ok(alive.runtime.block_on(alive.store.find(chunks, wanted)))
    }

    /// See [`crate::PrefixStore::missing`].
    ///
    /// # Errors
    /// As there.
    pub fn missing(&self, names: &[ChunkName]) -> Result<Vec<bool>> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.missing(names))
    }

    /// See [`crate::PrefixStore::put`].
    ///
    /// # Errors
    /// As there.
    pub fn put(&self, objects: Vec<(ChunkName, Bytes)>) -> Result<()> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.put(objects))
    }

    /// See [`crate::PrefixStore::touch`].
    ///
    /// # Errors
    /// As there.
    pub fn touch(&self, names: &[ChunkName]) -> Result<()> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.touch(names))
    }

    /// See [`crate::PrefixStore::list`].
    ///
    /// # Errors
    /// As there.
    pub fn list(&self) -> Result<Vec<(ChunkName, Entry)>> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.list())
    }

    /// See [`crate::PrefixStore::hits`].
    ///
    /// # Errors
    /// As there.
    pub fn hits(&self, scope: &str) -> Result<Option<u64>> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.hits(scope))
    }

    /// See [`crate::PrefixStore::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, name: &ChunkName) -> Result<Option<Container>> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.read(name))
    }

    /// See [`crate::PrefixStore::page`].
    ///
    /// # Errors
    /// As there.
    pub fn page(&self, name: &ChunkName) -> Result<Option<Container>> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.page(name))
    }

    /// See [`crate::PrefixStore::delete`].
    ///
    /// # Errors
    /// As there.
    pub fn delete(&self, name: &ChunkName) -> Result<()> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.delete(name))
    }

    /// See [`crate::PrefixStore::evict`].
    ///
    /// # Errors
    /// As there.
    pub fn evict(&self) -> Result<Evicted> {
        let alive = self.alive()?;
        alive.runtime.block_on(alive.store.evict())
    }

    /// This process's threads: a forked one has none of its parent's.
    fn alive(&self) -> Result<Arc<Alive>> {
        let mut alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        if alive.process != process::id() {
            let own = Arc::new(Alive::new(&self.secret_url.0, self.options)?);
            // Whoever drops the parent's runtime here waits for threads that are not there.
            mem::forget(mem::replace(&mut *alive, own));
        }
        Ok(Arc::clone(&alive))
    }
}
