//! A chunk of a prefix: where it is kept, and whether what lies there is it.

use std::fmt;

use crate::container::Container;
use crate::scope::{ChunkKey, Scope};

/// Of the names, as of the format of what they hold.
pub(crate) const FAMILY: &str = "v1";

/// Which layers a stored object holds. A prefix needs a chunk's layers of full attention wherever it ends, those with a
/// sliding window only near its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Layers that hold all tokens.
    Full,
    /// Layers with a sliding window.
    Window,
}

/// The name of one stored object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChunkName {
    /// Of the scope.
    pub scope: String,
    /// Hex digits.
    pub key: String,
    /// Position behind its last token.
    pub end: usize,
    /// Which layers.
    pub part: Part,
}

impl fmt::Display for ChunkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.part == Part::Window { "-w" } else { "" };
        write!(f, "{FAMILY}/{}/{}-{}{suffix}.kvl", self.scope, self.key, self.end)
    }
}

impl ChunkName {
    /// Reads a name; `None` for what is none of ours.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let [family, scope, file] = name.split('/').collect::<Vec<_>>().try_into().ok()?;
        let (key, rest) = file.strip_suffix(".kvl")?.split_once('-')?;
        let (end, part) = rest.strip_suffix("-w").map_or((rest, Part::Full), |end| (end, Part::Window));
        let parsed = Self { scope: scope.to_owned(), key: key.to_owned(), end: end.parse().ok()?, part };
        let is_hex = |text: &str, n: usize| text.len() == n && text.bytes().all(|b| b.is_ascii_hexdigit());
        let ours = family == FAMILY && is_hex(scope, 32) && is_hex(key, 64) && parsed.to_string() == name;
        ours.then_some(parsed)
    }

    /// Why a container that lies there is none of this name; `None` if it is.
    #[must_use]
    pub fn mismatch(&self, found: &Container) -> Option<&'static str> {
        let header = found.header();
        if header.chunk_key != self.key {
            return Some("it says that it is another chunk");
        }
        ((header.batch, header.n_tokens) != (1, self.end)).then_some("it holds other positions")
    }
}

/// A chunk of a sequence whose tokens are known.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Whose.
    pub scope: &'a Scope,
    /// From 0.
    pub index: usize,
    /// Of its tokens and all before.
    pub key: ChunkKey,
    /// Its tokens.
    pub token_ids: &'a [u32],
}

impl<'a> Chunk<'a> {
    /// All whole chunks of a sequence.
    #[must_use]
    pub fn all(scope: &'a Scope, token_ids: &'a [u32]) -> Vec<Self> {
        let ids = token_ids.chunks_exact(scope.chunk_len());
        let keys = scope.keys(token_ids);
        let chunks = keys.into_iter().zip(ids).enumerate();
        chunks.map(|(index, (key, token_ids))| Self { scope, index, key, token_ids }).collect()
    }

    /// Position of its first token.
    #[must_use]
    pub const fn start(&self) -> usize {
        self.index * self.scope.chunk_len()
    }

    /// Position behind its last token.
    #[must_use]
    pub const fn end(&self) -> usize {
        self.start() + self.scope.chunk_len()
    }

    /// Where a part of it is kept.
    #[must_use]
    pub fn name(&self, part: Part) -> ChunkName {
        ChunkName { scope: self.scope.name(), key: self.key.to_string(), end: self.end(), part }
    }

    /// Why a container that lies there is not this chunk; `None` if it is. Tokens are compared one by one.
    #[must_use]
    pub fn mismatch(&self, found: &Container) -> Option<&'static str> {
        if let Some(what) = self.name(Part::Full).mismatch(found) {
            return Some(what);
        }
        if found.header().first_token_id != self.start() {
            return Some("it holds other positions");
        }
        if found.token_ids().as_deref() != Some(self.token_ids) {
            return Some("it holds other tokens");
        }
        None
    }
}
