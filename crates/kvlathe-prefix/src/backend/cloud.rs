//! In an object store: S3 and what speaks as it does, Google Cloud Storage, Azure, HTTP.

use std::sync::Once;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, parse_url_opts};
use url::Url;

use super::{Backend, Entry, Failure};

/// A bucket, and what stands in front of all names in it.
#[derive(Debug)]
pub(super) struct Cloud {
    store: Box<dyn ObjectStore>,
    prefix: Path,
}

impl Cloud {
    /// Credentials and the like come from the environment, as these services' own tools read them.
    pub(super) fn open(url: &Url) -> Result<Self, Failure> {
        use_ring();
        if url.host_str().is_none_or(str::is_empty) {
            let scheme = url.scheme();
            return Err(format!("a bucket is missing; expected {scheme}://bucket/prefix").into());
        }
        let environment = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
        let (store, prefix) = parse_url_opts(url, environment)?;
        Ok(Self { store, prefix })
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

/// For TLS, unless the process has chosen something already.
pub(super) fn use_ring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

fn there<T>(found: Result<T, Error>) -> Result<Option<T>, Failure> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[async_trait]
impl Backend for Cloud {
    async fn get(&self, name: &str) -> Result<Option<Bytes>, Failure> {
        match there(self.store.get(&self.path(name)).await)? {
            Some(found) => Ok(Some(found.bytes().await?)),
            None => Ok(None),
        }
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Failure> {
        self.store.put(&self.path(name), bytes.into()).await?;
        Ok(())
    }

    async fn exists(&self, name: &str) -> Result<bool, Failure> {
        Ok(there(self.store.head(&self.path(name)).await)?.is_some())
    }

    async fn delete(&self, name: &str) -> Result<(), Failure> {
        there(self.store.delete(&self.path(name)).await).map(drop)
    }

    async fn list(&self) -> Result<Vec<Entry>, Failure> {
        let n_before = self.prefix.parts().count();
        let found: Vec<_> = self.store.list(Some(&self.prefix)).try_collect().await?;
        let entry = |object: object_store::ObjectMeta| {
            let name: Vec<String> =
                object.location.parts().skip(n_before).map(|part| part.as_ref().to_owned()).collect();
            Entry { name: name.join("/"), n_bytes: object.size, used_at: object.last_modified.into() }
        };
        Ok(found.into_iter().map(entry).collect())
    }
}
