//! Where chunks are kept: names and bytes, in a folder, in memory, in an object store, in Redis.

use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use url::Url;

#[cfg(feature = "cloud")]
mod cloud;
mod folder;
mod memory;
#[cfg(feature = "redis")]
mod redis;

use crate::error::{Result, StoreError};

/// What a backend may say when it fails.
pub type Failure = Box<dyn Error + Send + Sync>;

/// An object that is kept.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As it was put.
    pub name: String,
    /// Its size.
    pub n_bytes: u64,
    /// When it was last read, or written where nobody notes reading.
    pub used_at: SystemTime,
}

/// Objects by name. An object appears whole or not at all, and never changes: two writers of a name have the same bytes
/// in mind, and either may win.
#[async_trait]
pub trait Backend: Debug + Send + Sync {
    /// An object's bytes; `None` if it is not there.
    async fn get(&self, name: &str) -> std::result::Result<Option<Bytes>, Failure>;
    /// Keeps an object.
    async fn put(&self, name: &str, bytes: Bytes) -> std::result::Result<(), Failure>;
    /// Whether it is there.
    async fn exists(&self, name: &str) -> std::result::Result<bool, Failure>;
    /// Removes it; fine if it is gone.
    async fn delete(&self, name: &str) -> std::result::Result<(), Failure>;
    /// All that is kept, in no order.
    async fn list(&self) -> std::result::Result<Vec<Entry>, Failure>;
    /// Notes that an object was used, where eviction goes by that.
    async fn touch(&self, _name: &str) -> std::result::Result<(), Failure> {
        Ok(())
    }
    /// Adds one to a counter, where there are counters.
    async fn count(&self, _name: &str) -> std::result::Result<(), Failure> {
        Ok(())
    }
    /// What a counter has come to; `None` where there are none.
    async fn counted(&self, _name: &str) -> std::result::Result<Option<u64>, Failure> {
        Ok(None)
    }
}

/// The backend of a URL.
///
/// # Errors
/// A URL of an unknown kind, or one that lacks something.
#[cfg_attr(not(feature = "redis"), expect(unused_variables, reason = "others are told to evict"))]
pub(crate) async fn open(
    text: &str,
    timeout: Duration,
    expiry: Option<Duration>,
) -> Result<Arc<dyn Backend>> {
    let url = parse(text)?;
    let wrong = |what: String| StoreError::Url { url: redacted(text), what: without_secrets(&url, &what) };
    match url.scheme() {
        "file" => {
            let path = url.to_file_path().map_err(|()| {
                wrong("no folder of this machine; expected file:///folder, with three slashes".to_owned())
            })?;
            Ok(Arc::new(folder::Folder::open(path).map_err(|error| wrong(error.to_string()))?))
        }
        "memory" => Ok(Arc::new(memory::Memory::default())),
        #[cfg(feature = "redis")]
        "redis" | "rediss" => Ok(Arc::new(
            redis::Redis::open(&url, timeout, expiry).await.map_err(|error| wrong(error.to_string()))?,
        )),
        #[cfg(feature = "cloud")]
        _ => Ok(Arc::new(cloud::Cloud::open(&url).map_err(|error| wrong(error.to_string()))?)),
        #[cfg(not(feature = "cloud"))]
        scheme => Err(wrong(format!("this build knows no {scheme}://; expected file, memory or redis"))),
    }
}

fn parse(text: &str) -> Result<Url> {
    Url::parse(text).map_err(|error| StoreError::Url {
        url: redacted(text),
        what: format!(
            "this is no URL ({error}); expected file:///folder, s3://bucket/prefix, redis://host or memory://"
        ),
    })
}

/// What a library says of a URL, which it may repeat.
fn without_secrets(url: &Url, what: &str) -> String {
    let shown = what.replace(url.as_str(), &redacted(url.as_str()));
    [url.password(), url.query()]
        .into_iter()
        .flatten()
        .filter(|secret| !secret.is_empty())
        .fold(shown, |shown, secret| shown.replace(secret, "…"))
}

/// A URL for people: without user, password and query, which may hold secrets.
pub(crate) fn redacted(text: &str) -> String {
    let Some(mut url) = Url::parse(text).ok().filter(|url| !url.cannot_be_a_base()) else {
        return match text.rsplit_once('@') {
            Some((_, host)) => format!("…@{host}"),
            None => text.to_owned(),
        };
    };
    if url.has_authority() && (!url.username().is_empty() || url.password().is_some()) {
        // They cannot fail on a URL that has both places.
        let _ = url.set_password(None);
        let _ = url.set_username("");
    }
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}
