//! A system without memory: every operation that grows with the tokens gives an error and leaves the cache as it was.

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvlathe_cache::{AttentionOptions, CacheError, Coding, LayerCache, MemoryUse, Policy, TensorView};
use kvlathe_codec::{Basis, CodecError, Side, StreamSet, Width};

/// Refuses one large allocation: that before which `LEFT` others were granted.
struct Failing;

/// What an allocation must take to count. Below are lists of pointers, and tables for one block.
const LARGE: usize = 8 << 10;
const NEVER: usize = usize::MAX;
static LEFT: AtomicUsize = AtomicUsize::new(NEVER);

impl Failing {
    fn refuses(size: usize) -> bool {
        size >= LARGE
            && LEFT.load(Ordering::Relaxed) != NEVER
            && LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged, or refused, which any call may be.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if Self::refuses(layout.size()) {
            return null_mut();
        }
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Systems shrink in place.
        if size > layout.size() && Self::refuses(size) {
            return null_mut();
        }
        // SAFETY: the caller's promises are the system's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

const HEADS: usize = 2;
const DIM: usize = 64;
const BLOCK_LEN: usize = 128;
const POLICY: Policy = Policy { n_sinks: 40, compress_start_len: 0, n_tail: 50, window: None };

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

fn blocks() -> Coding {
    let basis = Basis {
        mean: vec![0.0; DIM],
        synthesis: identity(DIM),
        importance: vec![1.0; DIM],
        widths: vec![Width::W8; DIM],
    };
    Coding::Blocks(Arc::new(StreamSet::new(&[basis.clone(), basis], None, BLOCK_LEN).unwrap()))
}

fn tensor(n_tokens: usize, batch: usize, seed: usize) -> Vec<f32> {
    (0..batch * HEADS * n_tokens * DIM).map(|i| ((i * 7 + seed * 131) as f32 * 0.61).sin()).collect()
}

type Contents = (usize, usize, usize, Vec<f32>, Vec<f32>, MemoryUse);

fn contents(cache: &LayerCache<f32>) -> Contents {
    let (first, n) = (cache.first(), cache.n_tokens());
    let mut keys = vec![0.0; cache.batch() * HEADS * (n - first) * DIM];
    let mut values = keys.clone();
    cache.read(Side::Key, first..n, &mut keys, n - first, 1).unwrap();
    cache.read(Side::Value, first..n, &mut values, n - first, 1).unwrap();
    (n, cache.batch(), cache.n_coded(), keys, values, cache.memory_use())
}

/// Runs an operation again and again, with each of its large allocations failing once, until one run meets none; returns
/// how many failed.
fn survives<R>(
    cache: &mut LayerCache<f32>,
    operation: impl Fn(&mut LayerCache<f32>) -> Result<R, CacheError>,
) -> usize {
    for granted in 0.. {
        let before = contents(cache);
        LEFT.store(granted, Ordering::Relaxed);
        let result = operation(cache);
        LEFT.store(NEVER, Ordering::Relaxed);
        let Err(error) = result else { return granted };
        assert!(matches!(error, CacheError::Codec(CodecError::OutOfMemory { .. })), "{error}");
        let after = contents(cache);
        assert_eq!(after.0, before.0, "tokens");
        assert!(after == before || after.5 != before.5, "contents");
        // Room that was made for some heads is given back, but for a little.
        let slack = 2 * cache.batch() * HEADS * 128 * DIM * size_of::<f32>();
        assert!(after.5.exact_bytes <= before.5.exact_bytes + slack, "memory");
        assert_eq!((after.1, after.2, &after.3, &after.4), (before.1, before.2, &before.3, &before.4));
    }
    unreachable!("some run meets no failure");
}

// One test: the allocator is the process's.
#[test]
fn every_operation_survives_every_failing_allocation() {
    // On one thread.
    let mut n_failed = 0;
    for (key, value) in [(blocks(), blocks()), (Coding::Exact, blocks()), (blocks(), Coding::Exact)] {
        let fused = matches!((&key, &value), (Coding::Blocks(_), Coding::Blocks(_)));
        let new = |policy| {
            LayerCache::<f32>::new(key.clone(), value.clone(), policy, 2, HEADS, (DIM, DIM)).unwrap()
        };
        let (mut cache, mut window) = (new(POLICY), new(Policy { window: NonZeroUsize::new(201), ..POLICY }));
        for (n_tokens, seed) in [(700, 1), (1, 2), (300, 3)] {
            let data = tensor(n_tokens, 2, seed);
            let view = TensorView::contiguous(&data, [2, HEADS, n_tokens, DIM]).unwrap();
            n_failed += survives(&mut cache, |cache| cache.append(view, view));
            n_failed += survives(&mut cache, |cache| cache.compress(1));
            window.append(view, view).unwrap();
            n_failed += survives(&mut window, |window| window.settle(1));
        }
        assert!(window.first() > 700 && window.n_coded() > 0);
        assert!(cache.n_coded() >= 7 * BLOCK_LEN - POLICY.n_sinks);
        if fused {
            for n_queries in [1, 300] {
                let queries = tensor(n_queries, 2, 4);
                let view = TensorView::contiguous(&queries, [2, HEADS, n_queries, DIM]).unwrap();
                let out = std::cell::RefCell::new(vec![0.0; queries.len()]);
                let options = AttentionOptions { scaling: 0.1, ..AttentionOptions::default() };
                let attend =
                    |cache: &mut LayerCache<f32>| cache.attend(view, options, &mut out.borrow_mut(), None, 1);
                attend(&mut cache).unwrap();
                n_failed += survives(&mut cache, attend);
            }
        }
        n_failed += survives(&mut cache, |cache| cache.try_clone());
        // Beams: another order, then more of them.
        n_failed += survives(&mut cache, |cache| cache.select(&[1, 0]));
        n_failed += survives(&mut cache, |cache| cache.select(&[1, 0, 0]));
        // Into a block.
        n_failed += survives(&mut cache, |cache| cache.crop(301));
        n_failed += survives(&mut cache, |cache| cache.crop(400));
        assert_eq!((cache.n_tokens(), cache.batch()), (300, 3));
    }
    println!("{n_failed} allocations failed");
    assert!(n_failed > 100, "{n_failed} allocations failed");
}

#[test]
fn sizes_beyond_all_memory_are_an_error() {
    let new = LayerCache::<f32>::new(Coding::Exact, Coding::Exact, POLICY, usize::MAX / 2, 1, (8, 8));
    assert!(matches!(new, Err(CacheError::Codec(CodecError::OutOfMemory { .. }))));
}
