//! Who does the work: the team of threads that the application's tensor library has, where it lends one, else threads
//! of our own. Never rayon's global pool, which belongs to the application.
//!
//! An OpenMP runtime's threads spin for a while after each parallel region. Beside them, threads of our own would get
//! a part of a core; as tasks of the same team ours start at once and have the cores for themselves.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvlathe_codec::memory;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{CacheError, Result};

/// Threads that somebody else owns.
pub trait Team: Send + Sync {
    /// Calls `work` on at most `n_threads` threads, the caller's among them, and returns when all calls have.
    ///
    /// `work` never unwinds.
    fn run(&self, n_threads: usize, work: &(dyn Fn() + Sync));
}

/// Something that does not survive a fork, with the process that it belongs to.
struct Owned<T> {
    process: u32,
    it: T,
}

/// Our own threads.
struct Pool {
    n_threads: usize,
    threads: Arc<ThreadPool>,
}

static TEAM: Mutex<Option<Owned<Arc<dyn Team>>>> = Mutex::new(None);
static POOL: Mutex<Option<Owned<Pool>>> = Mutex::new(None);

/// Lets all caches work on somebody else's threads.
///
/// After a fork the child goes back to threads of its own: the team's exist only in the parent.
pub fn adopt_team(team: Arc<dyn Team>) {
    let mut slot = TEAM.lock().unwrap_or_else(PoisonError::into_inner);
    *slot = Some(Owned { process: std::process::id(), it: team });
}

fn team() -> Option<Arc<dyn Team>> {
    let slot = TEAM.lock().unwrap_or_else(PoisonError::into_inner);
    slot.as_ref().filter(|owned| owned.process == std::process::id()).map(|owned| Arc::clone(&owned.it))
}

/// Tasks that threads take one after another until none is left.
struct Queue<'a> {
    next: AtomicUsize,
    n_tasks: usize,
    work: &'a (dyn Fn(usize) + Sync),
    panicked: AtomicBool,
}

impl Queue<'_> {
    /// A panic must not unwind into somebody else's thread; it ends the queue and is raised again by the caller.
    fn take_all(&self) {
        let all = || {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.n_tasks {
                    break;
                }
                (self.work)(task);
            }
        };
        if catch_unwind(AssertUnwindSafe(all)).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
            self.next.store(self.n_tasks, Ordering::Relaxed);
        }
    }
}

/// Runs `work(0)` to `work(n_tasks − 1)` on at most `n_threads` threads, in any order; inline when that is one.
///
/// # Panics
/// When a task has panicked.
pub fn for_each_task(n_threads: usize, n_tasks: usize, work: &(dyn Fn(usize) + Sync)) {
    if n_threads <= 1 || n_tasks <= 1 {
        (0..n_tasks).for_each(work);
        return;
    }
    let queue = Queue { next: AtomicUsize::new(0), n_tasks, work, panicked: AtomicBool::new(false) };
    match team() {
        Some(team) => team.run(n_threads, &|| queue.take_all()),
        None => match pool(n_threads) {
            Ok(pool) => drop(pool.broadcast(|_| queue.take_all())),
            // No threads to be had: then the caller does it all.
            Err(_) => queue.take_all(),
        },
    }
    assert!(!queue.panicked.load(Ordering::Relaxed), "a task has panicked");
}

/// As [`for_each_task`], for items that each belong to one task: pieces of an output, say.
///
/// # Errors
/// That of the first item that has one, after all have been worked on; no memory for the list.
///
/// # Panics
/// When a task has panicked.
pub(crate) fn for_each_item<T: Send>(
    n_threads: usize,
    items: Vec<T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    if n_threads <= 1 || items.len() <= 1 {
        return items.into_iter().try_for_each(work);
    }
    let mut slots = memory::room(items.len(), "a list of tasks")?;
    slots.extend(items.into_iter().map(|item| Mutex::new(Some(item))));
    let failed: Mutex<Option<(usize, CacheError)>> = Mutex::new(None);
    for_each_task(n_threads, slots.len(), &|task| {
        let item = slots[task].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = item.map(&work) {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            if failed.as_ref().is_none_or(|(first, _)| task < *first) {
                *failed = Some((task, error));
            }
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

/// Runs `work` on `n_threads` threads of the library's pool, at least one; on fewer where the system starts no more.
///
/// The pool is built on first use and again when `n_threads` changes or the process has forked. Its threads sleep
/// between calls.
///
/// # Errors
/// Not even one thread can be started; `work` was not called.
pub fn with_threads<R: Send>(n_threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    // Not without a pool: rayon would then start threads of its own, and panic when it cannot.
    Ok(pool(n_threads).or_else(|_| pool(1))?.install(work))
}

fn pool(n_threads: usize) -> Result<Arc<ThreadPool>> {
    let n_threads = n_threads.max(1);
    let process = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Owned { process: owner, it: pool }) = slot.as_ref()
        && *owner == process
        && pool.n_threads == n_threads
    {
        return Ok(Arc::clone(&pool.threads));
    }
    let threads = ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|i| format!("kvlathe-{i}"))
        .build()
        .map(Arc::new)
        .map_err(|error| CacheError::Threads { n_threads, reason: error.to_string() })?;
    if let Some(old) = slot.replace(Owned { process, it: Pool { n_threads, threads: Arc::clone(&threads) } })
        && old.process != process
    {
        // Its threads exist only in the parent; joining them here would wait for ever.
        std::mem::forget(old.it);
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{Team, adopt_team, for_each_item, for_each_task, with_threads};
    use crate::error::CacheError;

    #[test]
    fn the_pool_has_the_size_asked_for() {
        assert_eq!(with_threads(2, rayon::current_num_threads), Ok(2));
        assert_eq!(with_threads(3, rayon::current_num_threads), Ok(3));
    }

    fn every_task_runs_once() {
        for n_threads in [1, 2, 5] {
            let runs: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            for_each_task(n_threads, runs.len(), &|task| {
                runs[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    fn a_panic_comes_back_to_the_caller() {
        for n_threads in [1, 3] {
            let result = std::panic::catch_unwind(|| for_each_task(n_threads, 9, &|task| assert!(task != 4)));
            assert!(result.is_err());
        }
    }

    fn every_item_is_worked_on() {
        for n_threads in [1, 2, 5] {
            let mut done = [0; 9];
            for_each_item(n_threads, done.iter_mut().enumerate().collect(), |(at, to)| {
                *to = at;
                Ok(())
            })
            .expect("no item fails");
            assert_eq!(done, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
            let failing =
                |at| if at % 3 == 2 { Err(CacheError::Crop { given: at, held: 0 }) } else { Ok(()) };
            let first = for_each_item(n_threads, (0..9).collect(), failing);
            assert_eq!(first, Err(CacheError::Crop { given: 2, held: 0 }));
        }
    }

    /// Counts its calls, and uses scoped threads.
    struct Lent(AtomicUsize);

    impl Team for Lent {
        fn run(&self, n_threads: usize, work: &(dyn Fn() + Sync)) {
            self.0.fetch_add(1, Ordering::Relaxed);
            std::thread::scope(|scope| (0..n_threads).for_each(|_| drop(scope.spawn(work))));
        }
    }

    // One test: the team is the process's.
    #[test]
    fn tasks_run_on_own_threads_and_on_a_lent_team() {
        every_task_runs_once();
        every_item_is_worked_on();
        a_panic_comes_back_to_the_caller();
        let lent = Arc::new(Lent(AtomicUsize::new(0)));
        adopt_team(lent.clone());
        every_task_runs_once();
        a_panic_comes_back_to_the_caller();
        assert_eq!(lent.0.load(Ordering::Relaxed), 3);
        every_item_is_worked_on();
    }
}
