//! In Redis, or what speaks as it does.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, Client, RedisError};
use url::Url;

use super::{Backend, Entry, Failure};

/// In front of all names, so that they stand apart from what else the server holds.
const PREFIX: &str = "kvlathe:";

/// A connection that comes back when it was lost.
pub(super) struct Redis {
    connection: ConnectionManager,
    expiry: Option<Duration>,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Redis(expiry {:?})", self.expiry)
    }
}

impl Redis {
    /// Objects that nobody reads for `expiry` go.
    pub(super) async fn open(
        url: &Url,
        timeout: Duration,
        expiry: Option<Duration>,
    ) -> Result<Self, RedisError> {
        #[cfg(feature = "cloud")]
        super::cloud::use_ring();
        let client = Client::open(url.as_str())?;
        // The store has a time limit of its own, for all attempts together. The client's, half a second, is too short
        // for chunks of megabytes on a slow line.
        let config =
            ConnectionManagerConfig::new().set_number_of_retries(2).set_response_timeout(Some(timeout));
        let connection = ConnectionManager::new_lazy_with_config(client, config)?;
        Ok(Self { connection, expiry })
    }

    fn seconds(&self) -> Option<u64> {
        self.expiry.map(|expiry| expiry.as_secs().max(1))
    }
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

#[async_trait]
impl Backend for Redis {
    async fn get(&self, name: &str) -> Result<Option<Bytes>, Failure> {
        let found: Option<Vec<u8>> = self.connection.clone().get(key(name)).await?;
        Ok(found.map(Bytes::from))
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Failure> {
        let mut connection = self.connection.clone();
        let bytes: &[u8] = &bytes;
        match self.seconds() {
            Some(seconds) => connection.set_ex::<_, _, ()>(key(name), bytes, seconds).await?,
            None => connection.set::<_, _, ()>(key(name), bytes).await?,
        }
        Ok(())
    }

    async fn exists(&self, name: &str) -> Result<bool, Failure> {
        Ok(self.connection.clone().exists(key(name)).await?)
    }

    async fn delete(&self, name: &str) -> Result<(), Failure> {
        Ok(self.connection.clone().del::<_, ()>(key(name)).await?)
    }

    async fn list(&self) -> Result<Vec<Entry>, Failure> {
        let mut connection = self.connection.clone();
        let now = SystemTime::now();
        let mut found = Vec::new();
        let mut cursor = 0_u64;
        loop {
            let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg(format!("{PREFIX}*"))
                .arg("COUNT")
                .arg(1000)
                .query_async(&mut connection)
                .await?;
            for key in keys {
                // Neither command counts as a use. None where the key went meanwhile, or where the server counts how
                // often and not when.
                let n_bytes: Option<u64> =
                    redis::cmd("MEMORY").arg("USAGE").arg(&key).query_async(&mut connection).await?;
                let Some(n_bytes) = n_bytes else { continue };
                let idle: Option<u64> = redis::cmd("OBJECT")
                    .arg("IDLETIME")
                    .arg(&key)
                    .query_async(&mut connection)
                    .await
                    .unwrap_or(None);
                let used_at = now.checked_sub(Duration::from_secs(idle.unwrap_or(0))).unwrap_or(now);
                let name = key[PREFIX.len()..].to_owned();
                found.push(Entry { name, n_bytes, used_at });
            }
            cursor = next;
            if cursor == 0 {
                // A scan may show a key twice.
                found.sort_by(|a, b| a.name.cmp(&b.name));
                found.dedup_by(|a, b| a.name == b.name);
                return Ok(found);
            }
        }
    }

    async fn count(&self, name: &str) -> Result<(), Failure> {
        Ok(self.connection.clone().incr::<_, _, ()>(key(name), 1).await?)
    }

    async fn counted(&self, name: &str) -> Result<Option<u64>, Failure> {
        let found: Option<u64> = self.connection.clone().get(key(name)).await?;
        Ok(Some(found.unwrap_or(0)))
    }

    async fn touch(&self, name: &str) -> Result<(), Failure> {
        let mut connection = self.connection.clone();
        match self.seconds() {
            Some(seconds) => {
                let _: bool = connection.expire(key(name), seconds as i64).await?;
            }
            None => {
                let _: u64 = redis::cmd("TOUCH").arg(key(name)).query_async(&mut connection).await?;
            }
        }
        Ok(())
    }
}
