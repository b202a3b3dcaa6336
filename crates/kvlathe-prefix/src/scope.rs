//! What a stored prefix depends on, and the keys of its chunks.

use std::fmt;

use kvlathe_codec::Digest;

/// Of the keys as they are computed here; another way needs another name.
const CONTEXT: &str = "kvlathe 2026-11 keys of stored prefixes, version 1";

/// The name of a chunk's tokens *and of all before them*: BLAKE3, chained over chunks.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkKey([u8; 32]);

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Everything that keys and values depend on beside the tokens. Caches of different scopes never meet.
#[derive(Debug, Clone, Copy)]
pub struct Dependencies<'a> {
    /// Of the preset that packs the blocks.
    pub preset: Digest,
    /// Identity of the model's weights, its config, dtype and active adapters among them.
    pub weights: &'a str,
    /// What the caller says that token ids do not: of images, sounds, embeddings; empty for text.
    pub extra: &'a [u8],
    /// Tokens of a chunk, a whole number of blocks.
    pub chunk_len: usize,
}

/// One model, one preset, one tenant: a name space of chunks.
#[derive(Clone)]
pub struct Scope {
    secret: [u8; 32],
    root: [u8; 32],
    chunk_len: usize,
}

impl fmt::Debug for Scope {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scope({}, chunks of {} tokens)", self.name(), self.chunk_len)
    }
}

impl Scope {
    /// The scope of `dependencies`. Whoever lacks `tenant_secret` can neither name nor guess its chunks.
    ///
    /// # Panics
    /// With chunks of no tokens.
    #[must_use]
    pub fn new(dependencies: &Dependencies<'_>, tenant_secret: &[u8]) -> Self {
        assert!(dependencies.chunk_len > 0, "chunks of 0 tokens");
        let secret = blake3::derive_key(CONTEXT, tenant_secret);
        let mut root = blake3::Hasher::new_keyed(&secret);
        root.update(dependencies.preset.as_bytes());
        root.update(&(dependencies.chunk_len as u64).to_le_bytes());
        // Lengths, so that no two lists of fields have the same bytes.
        for field in [dependencies.weights.as_bytes(), dependencies.extra] {
            root.update(&(field.len() as u64).to_le_bytes());
            root.update(field);
        }
        Self { secret, root: root.finalize().into(), chunk_len: dependencies.chunk_len }
    }

    /// Tokens of a chunk.
    #[must_use]
    pub const fn chunk_len(&self) -> usize {
        self.chunk_len
    }

    /// What all chunks of the scope have in front of their names: 32 hex digits.
    #[must_use]
    pub fn name(&self) -> String {
        blake3::Hash::from_bytes(self.root).to_hex()[..32].to_owned()
    }

    /// The key of tokens that a server names by a key of its own, which depends on all tokens before them.
    #[must_use]
    pub fn page_key(&self, server_key: &[u8]) -> ChunkKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&self.root);
        hasher.update(server_key);
        ChunkKey(hasher.finalize().into())
    }

    /// The keys of all whole chunks of these tokens, oldest first.
    #[must_use]
    pub fn keys(&self, token_ids: &[u32]) -> Vec<ChunkKey> {
        let mut parent = self.root;
        let chunks = token_ids.chunks_exact(self.chunk_len);
        chunks
            .map(|ids| {
                let mut hasher = blake3::Hasher::new_keyed(&self.secret);
                hasher.update(&parent);
                for id in ids {
                    hasher.update(&id.to_le_bytes());
                }
                parent = hasher.finalize().into();
                ChunkKey(parent)
            })
            .collect()
    }
}
