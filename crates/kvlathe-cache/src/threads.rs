//! The library's own threads. Never rayon's global pool, which belongs to the application.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The pool, with the process it belongs to: threads do not survive a fork.
struct Owned {
    process: u32,
    n_threads: usize,
    pool: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Owned>> = Mutex::new(None);

/// Runs `work` on at most `n_threads` threads of the library's pool; inline when that is one.
///
/// The pool is built on first use and again when `n_threads` changes or the process has forked. Its threads sleep
/// between calls.
pub fn with_threads<R: Send>(n_threads: usize, work: impl FnOnce() -> R + Send) -> R {
    match pool(n_threads) {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

fn pool(n_threads: usize) -> Option<Arc<ThreadPool>> {
    if n_threads == 0 {
        return None;
    }
    let process = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(owned) = slot.as_ref()
        && owned.process == process
        && owned.n_threads == n_threads
    {
        return Some(Arc::clone(&owned.pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|i| format!("kvlathe-{i}"))
        .build()
        .map(Arc::new)
        .ok()?;
    if let Some(old) = slot.replace(Owned { process, n_threads, pool: Arc::clone(&pool) })
        && old.process != process
    {
        // Its threads exist only in the parent; joining them here would wait for ever.
        std::mem::forget(old.pool);
    }
    Some(pool)
}

#[cfg(test)]
mod tests {
    use super::with_threads;

    #[test]
    fn the_pool_has_the_size_asked_for() {
        assert_eq!(with_threads(2, rayon::current_num_threads), 2);
        assert_eq!(with_threads(3, rayon::current_num_threads), 3);
    }
}
