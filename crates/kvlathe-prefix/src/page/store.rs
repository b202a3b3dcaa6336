//! Pages of one model in a store, many at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kvlathe_cache::{Bytes, CacheError};
use kvlathe_codec::{Element, Side};

use super::{PageCodec, PageMemory, PageOrigin, Result};
use crate::blocking::PrefixStore;
use crate::chunk::{ChunkName, Part};
use crate::container::Container;
use crate::scope::Scope;

/// A page as its server names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PageName {
    /// The server's key, of its tokens and all before them.
    pub key: Vec<u8>,
    /// Of its first token.
    pub first_position: usize,
}

/// What became of a page that was to be kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saved {
    /// Bytes that were written; 0 if it was not kept.
    pub n_bytes: usize,
    /// The share of its energy that coding changes.
    pub changed: f64,
}

/// A server's pages under a URL: of one model, one preset, one tenant.
#[derive(Debug)]
pub struct PageStore {
    store: Arc<PrefixStore>,
    scope: Scope,
    codec: PageCodec,
    memory: PageMemory,
    model: String,
    weights: String,
}

impl PageStore {
    /// Of pages that `codec` packs and that lie as `memory` says; `model` is for people, `weights` identify it.
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn new(
        store: Arc<PrefixStore>,
        scope: Scope,
        codec: PageCodec,
        memory: PageMemory,
        (model, weights): (String, String),
    ) -> Result<Self> {
        for (what, given, expected) in [
            ("tokens of a page", memory.sizes().n_tokens(), codec.n_tokens()),
            ("tokens of a page's name", scope.chunk_len(), codec.n_tokens()),
            (
                "numbers of a page",
                memory.n_numbers(),
                codec.n_numbers(Side::Key) + codec.n_numbers(Side::Value),
            ),
        ] {
            if given != expected {
                return Err(CacheError::Shape { what, given, expected }.into());
            }
        }
        Ok(Self { store, scope, codec, memory, model, weights })
    }

    /// Where such a page is kept.
    #[must_use]
    pub fn name(&self, page: &PageName) -> ChunkName {
        let end = page.first_position.saturating_add(self.codec.n_tokens());
        let key = self.scope.page_key(&page.key).to_string();
        ChunkName { scope: self.scope.name(), key, end, part: Part::Full }
    }

    fn names(&self, pages: &[PageName]) -> Vec<ChunkName> {
        pages.iter().map(|page| self.name(page)).collect()
    }

    /// Which pages are not there, in their order.
    ///
    /// # Errors
    /// A store that fails or is slow.
    pub fn missing(&self, pages: &[PageName]) -> Result<Vec<bool>> {
        Ok(self.store.missing(&self.names(pages))?)
    }

    /// Notes that pages of one sequence were used, where eviction goes by that.
    ///
    /// # Errors
    /// A store that fails or is slow.
    pub fn touch(&self, pages: &[PageName]) -> Result<()> {
        Ok(self.store.touch(&self.names(pages))?)
    }

    /// Codes pages and keeps those whose energy coding changes by no more than the share `most_changed`, on `n_threads`
    /// threads. Numbers in another order than the codec takes them, at other positions or of another model are changed by
    /// several times what they should be.
    ///
    /// # Errors
    /// What [`PageCodec::encode`] refuses; a store that fails or is slow. What was kept before stays.
    pub fn save<E: Element>(
        &self,
        pages: Vec<(PageName, &[E])>,
        most_changed: f64,
        n_threads: usize,
    ) -> Result<Vec<Saved>> {
        let saved = each(pages, n_threads, |(page, memory)| {
            let name = self.name(&page);
            let bytes = self.encode(&page, memory, &name.key)?;
            let (n_bytes, changed) = (bytes.len(), self.changed(bytes.clone(), memory)?);
            let is_kept = changed <= most_changed;
            if is_kept {
                self.store.put(vec![(name, bytes)])?;
            }
            Ok(Saved { n_bytes: if is_kept { n_bytes } else { 0 }, changed })
        });
        saved.into_iter().collect()
    }

    /// Writes pages to memory, on `n_threads` threads. Of each: bytes that were read; `None` if it is not there.
    ///
    /// # Errors
    /// Of each: a store that fails or is slow, an object that is damaged, which is removed.
    pub fn load<E: Element>(
        &self,
        pages: Vec<(PageName, &mut [E])>,
        n_threads: usize,
    ) -> Vec<Result<Option<usize>>> {
        each(pages, n_threads, |(page, memory)| {
            let Some(found) = self.store.page(&self.name(&page))? else { return Ok(None) };
            self.decode(&found, memory)?;
            Ok(Some(found.n_bytes()))
        })
    }

    /// The share of a page's energy that coding has changed; 0 for a page of zeros that is one still.
    fn changed<E: Element>(&self, coded: Bytes, memory: &[E]) -> Result<f64> {
        let mut again = memory.to_vec();
        self.decode(&Container::from_bytes(coded)?, &mut again)?;
        let energy = |of: &mut dyn Iterator<Item = f32>| of.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let changed = energy(&mut memory.iter().zip(&again).map(|(x, y)| x.to_f32() - y.to_f32()));
        let all = energy(&mut memory[..self.memory.n_numbers()].iter().map(|x| x.to_f32()));
        Ok(if changed == 0.0 { 0.0 } else { changed / all })
    }

    fn encode<E: Element>(&self, page: &PageName, memory: &[E], chunk_key: &str) -> Result<Bytes> {
        let [keys, values] = self.memory.gather(memory)?;
        let origin = PageOrigin { chunk_key, model: &self.model, weights: &self.weights };
        self.codec.encode([&keys, &values], page.first_position, origin)
    }

    fn decode<E: Element>(&self, found: &Container, memory: &mut [E]) -> Result<()> {
        let numbers = |side| vec![E::default(); self.codec.n_numbers(side)];
        let [mut keys, mut values] = Side::ALL.map(numbers);
        self.codec.decode(found, [&mut keys, &mut values])?;
        self.memory.scatter([&keys, &values], memory)
    }
}

/// What `work` makes of each item, in their order, on at most `n_threads` threads. They wait for the store, so they are
/// none of those that caches compute on.
fn each<T: Send, R: Send>(items: Vec<T>, n_threads: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let n_items = items.len();
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let done: Vec<Mutex<Option<R>>> = (0..n_items).map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < n_items) {
            let item = items[index].lock().unwrap_or_else(PoisonError::into_inner).take();
            let result = item.map(&work);
            *done[index].lock().unwrap_or_else(PoisonError::into_inner) = result;
        }
    };
    thread::scope(|scope| {
        for _ in 1..n_threads.min(n_items) {
            // A system that gives no more threads leaves the work to those there are.
            let _ = thread::Builder::new().name("kvlathe-page".to_owned()).spawn_scoped(scope, run);
        }
        run();
    });
    done.into_iter()
        .filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}
