//! A step of decoding allocates nothing, but for the blocks that it packs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvlathe_cache::{AttentionOptions, Coding, LayerCache, Policy, TensorView};
use kvlathe_codec::{Basis, Pairing, Rope, StreamSet, Width};

/// Counts allocations.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const HEADS: usize = 2;
const GROUP: usize = 3;
const DIM: usize = 64;
const BLOCK_LEN: usize = 32;

fn blocks(rotated: bool) -> Coding {
    let basis = Basis {
        mean: vec![0.1; DIM],
        synthesis: (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.0 }).collect(),
        importance: vec![1.0; DIM],
        widths: vec![Width::W4; DIM],
    };
    let inv_freq = (0..DIM / 2).map(|i| 0.7f64.powi(i as i32)).collect();
    let rope = rotated.then(|| Arc::new(Rope::new(Pairing::HalfSplit, DIM, inv_freq).unwrap()));
    Coding::Blocks(Arc::new(StreamSet::new(&[basis.clone(), basis], rope, BLOCK_LEN).unwrap()))
}

fn vectors(n: usize, seed: usize) -> Vec<f32> {
    (0..n * DIM).map(|i| ((i * 7 + seed * 131) as f32 * 0.61).sin()).collect()
}

// One test: the allocator is the process's.
#[test]
fn steps_allocate_only_the_blocks_that_they_pack() {
    decode(None);
    decode(NonZeroUsize::new(600));
}

/// Decodes, a layer with a sliding window or with all tokens.
fn decode(window: Option<NonZeroUsize>) {
    let policy = Policy { n_sinks: 4, n_tail: 50, window, ..Policy::default() };
    let mut cache =
        LayerCache::<f32>::new(blocks(true), blocks(false), policy, 1, HEADS, (DIM, DIM)).unwrap();
    let prompt = vectors(HEADS * 1500, 0);
    let view = TensorView::contiguous(&prompt, [1, HEADS, 1500, DIM]).unwrap();
    cache.append(view, view).unwrap();
    cache.compress(1).unwrap();

    let (token, queries) = (vectors(HEADS, 1), vectors(HEADS * GROUP, 2));
    let mut out = vec![0.0; HEADS * GROUP * DIM];
    let (mut quiet, mut packing) = (0, 0);
    // The first turn makes what the others use again.
    for step in 0..5 * BLOCK_LEN {
        // Blocks that leave a window move the first token.
        let coded_end = |cache: &LayerCache<f32>| cache.first() + cache.n_coded();
        let coded = coded_end(&cache);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let view = TensorView::contiguous(&token, [1, HEADS, 1, DIM]).unwrap();
        cache.append(view, view).unwrap();
        let queries = TensorView::contiguous(&queries, [1, HEADS * GROUP, 1, DIM]).unwrap();
        cache.attend(queries, AttentionOptions::default(), &mut out, None, 1).unwrap();
        cache.settle(1).unwrap();
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        if step < 2 * BLOCK_LEN {
            continue;
        }
        if coded_end(&cache) == coded {
            quiet += 1;
            assert_eq!(allocations, 0, "step {step}");
        } else {
            packing += 1;
            // For keys and values a block, the list that holds it, its rotation, and tasks for threads.
            assert!(allocations <= 60, "step {step}: {allocations} allocations");
        }
    }
    assert_eq!((quiet, packing), (3 * BLOCK_LEN - 3, 3));
}
