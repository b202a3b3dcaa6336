//! In this process, as long as the store lives: for tests and for one process that asks often.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Backend, Entry, Failure};

type Objects = HashMap<String, (Bytes, SystemTime)>;

/// Objects and counters by name.
#[derive(Debug, Default)]
pub(super) struct Memory {
    objects: Mutex<Objects>,
    counters: Mutex<HashMap<String, u64>>,
}

impl Memory {
    fn locked<T>(&self, go: impl FnOnce(&mut Objects) -> T) -> T {
        go(&mut locked(&self.objects))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Backend for Memory {
    async fn get(&self, name: &str) -> Result<Option<Bytes>, Failure> {
        Ok(self.locked(|held| held.get(name).map(|(bytes, _)| bytes.clone())))
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Failure> {
        self.locked(|held| held.insert(name.to_owned(), (bytes, SystemTime::now())));
        Ok(())
    }

    async fn exists(&self, name: &str) -> Result<bool, Failure> {
        Ok(self.locked(|held| held.contains_key(name)))
    }

    async fn delete(&self, name: &str) -> Result<(), Failure> {
        self.locked(|held| held.remove(name));
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Entry>, Failure> {
        let entry = |(name, (bytes, used_at)): (&String, &(Bytes, SystemTime))| Entry {
            name: name.clone(),
            n_bytes: bytes.len() as u64,
            used_at: *used_at,
        };
        Ok(self.locked(|held| held.iter().map(entry).collect()))
    }

    async fn touch(&self, name: &str) -> Result<(), Failure> {
        self.locked(|held| {
            if let Some((_, used_at)) = held.get_mut(name) {
                *used_at = SystemTime::now();
            }
        });
        Ok(())
    }

    async fn count(&self, name: &str) -> Result<(), Failure> {
        *locked(&self.counters).entry(name.to_owned()).or_default() += 1;
        Ok(())
    }

    async fn counted(&self, name: &str) -> Result<Option<u64>, Failure> {
        Ok(Some(locked(&self.counters).get(name).copied().unwrap_or(0)))
    }
}
