//! A store of prefixes: the longest stored one of a sequence, and new chunks for it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use kvlathe_cache::Policy;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};

use crate::backend::{self, Backend, Entry, Failure};
use crate::chunk::{Chunk, ChunkName, FAMILY, Part};
use crate::container::{Container, ContainerError};
use crate::error::{Result, StoreError};

/// Requests on their way at once.
const N_PARALLEL: usize = 8;

/// How a store behaves.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// For a whole lookup, and for each other answer of the store.
    pub timeout: Duration,
    /// [`PrefixStore::evict`] keeps so many bytes.
    pub max_bytes: Option<u64>,
    /// What was not used for so long goes: Redis sees to that, elsewhere [`PrefixStore::evict`] does.
    pub max_age: Option<Duration>,
}

impl Default for Options {
    /// Five seconds, no limits.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5), max_bytes: None, max_age: None }
    }
}

/// Which layers a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Whether any of its layers holds all tokens.
    pub full: bool,
    /// The longest sliding window, in tokens; none has one if `None`.
    pub window: Option<usize>,
}

/// What was found of a sequence.
#[derive(Debug, Default)]
pub struct Found {
    /// Chunks that the prefix has.
    pub n_chunks: usize,
    /// Their layers of full attention, oldest first; none if the model has none.
    pub full: Vec<Container>,
    /// Layers with windows, of the last chunks.
    pub window: Vec<Container>,
    /// Why there may be more than was found: a store that failed or was slow, or objects that are damaged.
    pub trouble: Option<StoreError>,
}

/// What eviction removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Objects.
    pub n_objects: usize,
    /// Their sizes together.
    pub n_bytes: u64,
}

/// Chunks of prefixes under a URL; see [`crate::blocking`] for a door without `async`.
#[derive(Debug, Clone)]
pub struct PrefixStore {
    url: Arc<str>,
    backend: Arc<dyn Backend>,
    options: Options,
}

impl PrefixStore {
    /// Opens `file:///folder`, `memory://`, `redis://host`, `s3://bucket/prefix` and what else `object_store` speaks.
    /// Credentials come from the environment.
    ///
    /// # Errors
    /// A URL that names no store, and a folder that cannot be made.
    pub async fn open(url: &str, options: Options) -> Result<Self> {
        let backend = backend::open(url, options.timeout, options.max_age).await?;
        Ok(Self { url: backend::redacted(url).into(), backend, options })
    }

    /// A store over a backend of one's own.
    pub fn over(backend: Arc<dyn Backend>, options: Options) -> Self {
        Self { url: "(given)".into(), backend, options }
    }

    /// The URL, without credentials.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The longest stored prefix of `chunks`, a sequence's first ones. What fails or takes too long ends it there.
    pub async fn find(&self, chunks: &[Chunk<'_>], wanted: Wanted) -> Found {
        let mut lookup =
            Lookup { store: self, deadline: Instant::now() + self.options.timeout, trouble: None };
        let mut full = Vec::new();
        let mut end = chunks.len();
        if wanted.full {
            full = lookup.in_order(chunks).await;
            end = full.len();
        }
        let mut window = BTreeMap::new();
        let mut first = end;
        if let Some(n_tokens) = wanted.window {
            while end > 0 {
                first = first_seen(&chunks[end - 1], n_tokens);
                lookup.all(chunks, first..end, &mut window).await;
                match (first..end).rfind(|index| !window.contains_key(index)) {
                    Some(missing) => end = missing,
                    None => break,
                }
            }
        }
        full.truncate(end);
        let window: Vec<Container> = (first..end).filter_map(|index| window.remove(&index)).collect();
        let used = |part: Part, range: std::ops::Range<usize>| {
            chunks[range].iter().map(move |chunk| chunk.name(part))
        };
        let names = used(Part::Full, 0..full.len()).chain(used(Part::Window, end - window.len()..end));
        let names: Vec<ChunkName> = names.collect();
        let store = self.clone();
        // Nobody waits for that.
        tokio::spawn(async move {
            if let Some(first) = names.first() {
                let _ = store.backend.count(&hits_name(&first.scope)).await;
            }
            store.touch(&names).await
        });
        Found { n_chunks: end, full, window, trouble: lookup.trouble }
    }

    /// Which of these are not there, in their order.
    ///
    /// # Errors
    /// A store that fails or is slow.
    pub async fn missing(&self, names: &[ChunkName]) -> Result<Vec<bool>> {
        let asked = stream::iter(names).map(|name| async move {
            let name = name.to_string();
            Ok(!self.ask("cannot look for", &name, self.backend.exists(&name)).await?)
        });
        asked.buffered(N_PARALLEL).try_collect().await
    }

    /// Keeps objects, several at a time. Whoever looks meanwhile finds those that are whole.
    ///
    /// # Errors
    /// A store that fails or is slow; what was written before stays.
    pub async fn put(&self, objects: Vec<(ChunkName, Bytes)>) -> Result<()> {
        let writing = stream::iter(objects).map(|(name, bytes)| async move {
            let name = name.to_string();
            self.ask("cannot write", &name, self.backend.put(&name, bytes)).await
        });
        writing.buffered(N_PARALLEL).try_collect().await
    }

    /// All chunks that are kept, other objects left out.
    ///
    /// # Errors
    /// A store that fails.
    pub async fn list(&self) -> Result<Vec<(ChunkName, Entry)>> {
        let found = self.ask("cannot list", "its objects", self.backend.list()).await?;
        Ok(found.into_iter().filter_map(|entry| Some((ChunkName::parse(&entry.name)?, entry))).collect())
    }

    /// How often a prefix of a scope was found; `None` where nobody counts, as in object stores.
    ///
    /// # Errors
    /// A store that fails or is slow.
    pub async fn hits(&self, scope: &str) -> Result<Option<u64>> {
        let name = hits_name(scope);
        self.ask("cannot read", &name, self.backend.counted(&name)).await
    }

    /// One object, checked as a file is; `None` if it is not there.
    ///
    /// # Errors
    /// A store that fails, an object that is damaged.
    pub async fn read(&self, name: &ChunkName) -> Result<Option<Container>> {
        let name = name.to_string();
        let Some(bytes) = self.ask("cannot read", &name, self.backend.get(&name)).await? else {
            return Ok(None);
        };
        // Checksums of megabytes, off the loop.
        let opened = spawn_blocking(move || Container::from_bytes(bytes)).await;
        match opened {
            Ok(Ok(container)) => Ok(Some(container)),
            Ok(Err(source)) => Err(StoreError::Damaged { name, source }),
            Err(stopped) => Err(self.failed("cannot check", &name, stopped.into())),
        }
    }

    /// Removes an object.
    ///
    /// # Errors
    /// A store that fails.
    pub async fn delete(&self, name: &ChunkName) -> Result<()> {
        let name = name.to_string();
        self.ask("cannot delete", &name, self.backend.delete(&name)).await
    }

    /// Removes what the limits do not allow: what is too old, then what was used longest ago, the ends of prefixes
    /// before their beginnings.
    ///
    /// # Errors
    /// A store that fails.
    pub async fn evict(&self) -> Result<Evicted> {
        let Options { max_bytes, max_age, .. } = self.options;
        if max_bytes.is_none() && max_age.is_none() {
            return Ok(Evicted::default());
        }
        let mut held = self.list().await?;
        held.sort_by_key(|(name, entry)| (entry.used_at, std::cmp::Reverse(name.end)));
        let mut left: u64 = held.iter().map(|(_, entry)| entry.n_bytes).sum();
        let now = SystemTime::now();
        let mut evicted = Evicted::default();
        for (name, entry) in held {
            let age = now.duration_since(entry.used_at).unwrap_or_default();
            if max_bytes.is_none_or(|max| left <= max) && max_age.is_none_or(|max| age <= max) {
                break;
            }
            self.delete(&name).await?;
            left -= entry.n_bytes;
            evicted.n_objects += 1;
            evicted.n_bytes += entry.n_bytes;
        }
        Ok(evicted)
    }

    /// Notes that these parts of one sequence were used, where eviction goes by that.
    ///
    /// # Errors
    /// A store that fails or is slow.
    pub async fn touch(&self, names: &[ChunkName]) -> Result<()> {
        // Ends first: a beginning is never older than what needs it.
        for name in names.iter().rev() {
            let name = name.to_string();
            self.ask("cannot note the use of", &name, self.backend.touch(&name)).await?;
        }
        Ok(())
    }

    /// An answer of the backend, in time.
    async fn ask<T>(
        &self,
        verb: &'static str,
        name: &str,
        answer: impl Future<Output = std::result::Result<T, Failure>>,
    ) -> Result<T> {
        match timeout(self.options.timeout, answer).await {
            Ok(Ok(said)) => Ok(said),
            Ok(Err(source)) => Err(self.failed(verb, name, source)),
            Err(_) => Err(self.too_slow()),
        }
    }

    fn too_slow(&self) -> StoreError {
        StoreError::Timeout { url: self.url().to_owned(), limit: self.options.timeout }
    }

    fn failed(&self, verb: &'static str, name: &str, source: Failure) -> StoreError {
        StoreError::Backend { url: self.url().to_owned(), verb, name: name.to_owned(), source }
    }

    /// A server's page, if it is there and is what its name says. What is not is removed, so that it is saved anew.
    ///
    /// # Errors
    /// A store that fails or is slow, an object that is damaged or something else.
    pub async fn page(&self, name: &ChunkName) -> Result<Option<Container>> {
        self.checked(name, |found| name.mismatch(found)).await
    }

    /// A part of a chunk, if it is there and is what its name says. What is not is removed, so that it is saved anew.
    async fn chunk(&self, chunk: &Chunk<'_>, part: Part) -> Result<Option<Container>> {
        self.checked(&chunk.name(part), |found| chunk.mismatch(found)).await
    }

    async fn checked(
        &self,
        name: &ChunkName,
        mismatch: impl FnOnce(&Container) -> Option<&'static str>,
    ) -> Result<Option<Container>> {
        let read = self.read(name).await.and_then(|found| match found {
            Some(container) => match mismatch(&container) {
                Some(what) => Err(StoreError::Mismatch { name: name.to_string(), what }),
                None => Ok(Some(container)),
            },
            None => Ok(None),
        });
        let is_broken = match &read {
            Err(StoreError::Mismatch { .. }) => true,
            Err(StoreError::Damaged { source, .. }) => {
                !matches!(source, ContainerError::Newer { .. } | ContainerError::OutOfMemory { .. })
            }
            _ => false,
        };
        if is_broken {
            // Whoever may not remove it goes without it.
            let _ = self.delete(name).await;
        }
        read
    }
}

/// Of the counter beside a scope's chunks.
fn hits_name(scope: &str) -> String {
    format!("{FAMILY}/{scope}/hits")
}

/// The first chunk that a query behind `last` sees through a window.
fn first_seen(last: &Chunk<'_>, window: usize) -> usize {
    let policy = Policy { window: NonZeroUsize::new(window), ..Policy::default() };
    (policy.first_seen(last.end()) / last.scope.chunk_len()).min(last.index)
}

/// One search, with its time limit and the first trouble it met.
struct Lookup<'a> {
    store: &'a PrefixStore,
    deadline: Instant,
    trouble: Option<StoreError>,
}

impl Lookup<'_> {
    /// Full layers of the first chunks, up to the first one that is missing.
    async fn in_order(&mut self, chunks: &[Chunk<'_>]) -> Vec<Container> {
        // The first one alone: most sequences that are not there miss it.
        let Some((first, rest)) = chunks.split_first() else { return Vec::new() };
        let mut found = Vec::new();
        let asked = self.store.chunk(first, Part::Full);
        let Some(container) = self.before_deadline(asked).await else { return found };
        found.push(container);
        let store = self.store;
        let mut asked =
            stream::iter(rest).map(|chunk| store.chunk(chunk, Part::Full)).buffered(N_PARALLEL).boxed();
        while let Some(container) =
            self.before_deadline(async { asked.next().await.unwrap_or(Ok(None)) }).await
        {
            found.push(container);
        }
        found
    }

    /// Windowed layers of these chunks, as far as they are there and not in `found`.
    async fn all(
        &mut self,
        chunks: &[Chunk<'_>],
        range: std::ops::Range<usize>,
        found: &mut BTreeMap<usize, Container>,
    ) {
        let indices: Vec<usize> = range.filter(|index| !found.contains_key(index)).collect();
        let store = self.store;
        let mut asked = stream::iter(&indices)
            .map(|&index| store.chunk(&chunks[index], Part::Window))
            .buffered(N_PARALLEL)
            .boxed();
        for &index in &indices {
            if let Some(container) =
                self.before_deadline(async { asked.next().await.unwrap_or(Ok(None)) }).await
            {
                found.insert(index, container);
            }
        }
    }

    async fn before_deadline(
        &mut self,
        asked: impl Future<Output = Result<Option<Container>>>,
    ) -> Option<Container> {
        let answer = timeout_at(self.deadline, asked).await.unwrap_or_else(|_| Err(self.store.too_slow()));
        answer.unwrap_or_else(|error| {
            self.trouble.get_or_insert(error);
            None
        })
    }
}
