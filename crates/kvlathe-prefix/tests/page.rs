//! A server's pages: whatever order they lie in, each is coded as the same tokens of one long cache are.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use kvlathe_cache::{CacheError, Coding, LayerCache, Policy, Tensor};
use kvlathe_codec::{Basis, Digest, Element, Pairing, Rope, Side, StreamId, StreamSet, Width};
use kvlathe_prefix::blocking::PrefixStore;
use kvlathe_prefix::container::Container;
use kvlathe_prefix::page::{PageCodec, PageMemory, PageName, PageSizes, PageStore};
use kvlathe_prefix::store::Options;
use kvlathe_prefix::{Dependencies, PageError, Scope, StoreError};
use proptest::prelude::*;

const LAYERS: usize = 2;
const HEADS: usize = 4;
const DIM: usize = 8;
const BLOCK_LEN: usize = 16;
const SINKS: usize = 3;
const N_TOKENS: usize = 2 * BLOCK_LEN;
const N_PAGES: usize = 3;
/// Of keys or of values of a page.
const N_NUMBERS: usize = LAYERS * HEADS * N_TOKENS * DIM;

const SIZES: PageSizes = PageSizes {
    n_layers: LAYERS,
    n_workers: 1,
    n_heads: HEADS,
    n_blocks: 2,
    block_tokens: 16,
    head_dim: DIM,
};

fn digest() -> Digest {
    Digest::from([7; 32])
}

fn set(layer: usize, side: Side) -> Arc<StreamSet> {
    let inv_freq = vec![1.0, 0.1, 0.01, 0.001];
    let rope = (side == Side::Key).then(|| Arc::new(Rope::new(Pairing::HalfSplit, DIM, inv_freq).unwrap()));
    let width = if layer == 0 { Width::W4 } else { Width::W3 };
    let bases = [(); HEADS].map(|()| Basis::uncalibrated(DIM, width));
    let id = StreamId { digest: digest(), layer, side };
    Arc::new(StreamSet::new(&bases, rope, BLOCK_LEN).unwrap().with_id(id))
}

fn codec() -> PageCodec {
    let layers = (0..LAYERS).map(|layer| Side::ALL.map(|side| set(layer, side))).collect();
    PageCodec::new(layers, SINKS, N_TOKENS).unwrap()
}

fn scope(weights: &str) -> Scope {
    let extra = b"a server";
    Scope::new(&Dependencies { preset: digest(), weights, extra, chunk_len: N_TOKENS }, b"")
}

/// Keys behind values of a token, tokens of a head, heads of a layer, layers of a block.
fn memory(sizes: PageSizes) -> PageMemory {
    let head = 2 * sizes.block_tokens * DIM;
    let block = sizes.n_heads * head;
    let layer = sizes.n_blocks * block;
    let places = (0..2).flat_map(|side| {
        (0..sizes.block_tokens).flat_map(move |token| (0..DIM).map(move |j| token * 2 * DIM + side * DIM + j))
    });
    PageMemory::new(sizes, [layer, sizes.n_layers * layer, head, block], places.collect()).unwrap()
}

fn store_of(store: &Arc<PrefixStore>, memory: PageMemory, weights: &str) -> PageStore {
    let (model, weights_name) = ("a model".to_owned(), weights.to_owned());
    PageStore::new(Arc::clone(store), scope(weights), codec(), memory, (model, weights_name)).unwrap()
}

fn in_folder(folder: &Path) -> Arc<PrefixStore> {
    let url = url::Url::from_file_path(folder).unwrap();
    Arc::new(PrefixStore::open(url.as_str(), Options::default()).unwrap())
}

/// A sequence of `N_PAGES` pages: each layer's keys and values.
fn sequence<E: Element>() -> Vec<[Tensor<E>; 2]> {
    let mut random = fastrand::Rng::with_seed(11);
    let mut tensor =
        || Tensor::from_fn([1, HEADS, N_PAGES * N_TOKENS, DIM], || E::from_f32(random.f32() * 2.0 - 1.0));
    (0..LAYERS).map(|_| [tensor(), tensor()]).collect()
}

/// One page of a sequence, `[layers, heads, n_tokens, head_dim]` of keys and of values.
fn page<E: Element>(of: &[[Tensor<E>; 2]], index: usize) -> [Vec<E>; 2] {
    [0, 1].map(|side| {
        let layers = of.iter().flat_map(|layer| {
            let view = layer[side].view();
            let tokens = index * N_TOKENS..(index + 1) * N_TOKENS;
            (0..HEADS).flat_map(move |head| {
                tokens.clone().flat_map(move |token| view.token(0, head, token).to_vec())
            })
        });
        layers.collect()
    })
}

fn name(index: usize) -> PageName {
    PageName { key: format!("hash {index}").into_bytes(), first_position: index * N_TOKENS }
}

fn filled<E: Element>(memory: &PageMemory, of: &[[Tensor<E>; 2]], index: usize) -> Vec<E> {
    let mut lying = vec![E::default(); memory.n_numbers() + 5];
    let [keys, values] = page(of, index);
    memory.scatter([&keys, &values], &mut lying).unwrap();
    lying
}

/// What a cache of the whole sequence holds of a page.
fn expected<E: Element>(of: &[[Tensor<E>; 2]], index: usize) -> [Vec<E>; 2] {
    let mut held = [Vec::new(), Vec::new()];
    for (layer, [keys, values]) in of.iter().enumerate() {
        let [key, value] = Side::ALL.map(|side| Coding::Blocks(set(layer, side)));
        let policy = Policy { n_sinks: SINKS, ..Policy::default() };
        let mut cache = LayerCache::new(key, value, policy, 1, HEADS, (DIM, DIM)).unwrap();
        cache.append(keys.view(), values.view()).unwrap();
        cache.settle(1).unwrap();
        for (side, held) in Side::ALL.into_iter().zip(&mut held) {
            let mut out = vec![E::default(); HEADS * N_TOKENS * DIM];
            let tokens = index * N_TOKENS..(index + 1) * N_TOKENS;
            cache.read(side, tokens, &mut out, N_TOKENS, 1).unwrap();
            held.extend(out);
        }
    }
    held
}

fn round_trip<E: Element>() {
    let folder = tempfile::tempdir().unwrap();
    let pages = store_of(&in_folder(folder.path()), memory(SIZES), "ab");
    let sequence = sequence::<E>();
    let lying: Vec<Vec<E>> = (0..N_PAGES).map(|index| filled(&memory(SIZES), &sequence, index)).collect();
    let names: Vec<PageName> = (0..N_PAGES).map(name).collect();
    assert_eq!(pages.missing(&names).unwrap(), [true; N_PAGES]);
    let given = names.iter().cloned().zip(lying.iter().map(Vec::as_slice)).collect();
    let saved = pages.save(given, 0.05, 2).unwrap();
    assert!(saved.iter().all(|page| (1e-6..0.05).contains(&page.changed)), "{saved:?}");
    let n_bytes: usize = saved.iter().map(|page| page.n_bytes).sum();
    assert_eq!(pages.missing(&names).unwrap(), [false; N_PAGES]);

    let mut again = vec![vec![E::default(); lying[0].len()]; N_PAGES];
    let wanted = names.iter().cloned().zip(again.iter_mut().map(Vec::as_mut_slice)).collect();
    let read: usize = pages.load(wanted, 2).into_iter().map(|one| one.unwrap().unwrap()).sum();
    assert_eq!(read, n_bytes);
    for (index, again) in again.iter().enumerate() {
        assert_eq!(memory(SIZES).gather(again).unwrap(), expected(&sequence, index), "page {index}");
        assert_eq!(again[memory(SIZES).n_numbers()..], [E::default(); 5], "behind the page");
    }
}

#[test]
fn a_page_is_coded_as_in_one_long_cache() {
    round_trip::<f32>();
    round_trip::<bf16>();
}

/// Shards of tensor parallelism: each worker's heads lie apart.
#[test]
fn workers_that_share_the_heads_make_the_same_objects() {
    let sequence = sequence::<f32>();
    let files = [1, 2, 4].map(|n_workers| {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(PageSizes { n_workers, n_heads: HEADS / n_workers, ..SIZES });
        let pages = store_of(&in_folder(folder.path()), memory.clone(), "ab");
        let lying = filled(&memory, &sequence, 1);
        pages.save(vec![(name(1), &lying)], 1.0, 1).unwrap();
        fs::read(folder.path().join(pages.name(&name(1)).to_string())).unwrap()
    });
    assert_eq!(files[0], files[1]);
    assert_eq!(files[0], files[2]);
}

#[test]
fn other_weights_positions_and_keys_find_nothing() {
    let store = Arc::new(PrefixStore::open("memory://", Options::default()).unwrap());
    let pages = store_of(&store, memory(SIZES), "ab");
    let lying = filled(&memory(SIZES), &sequence::<f32>(), 1);
    pages.save(vec![(name(1), &lying)], 1.0, 1).unwrap();
    let moved = PageName { first_position: 2 * N_TOKENS, ..name(1) };
    let other_key = PageName { key: b"hash 1\0".to_vec(), ..name(1) };
    assert_eq!(pages.missing(&[name(1), moved.clone(), other_key]).unwrap(), [false, true, true]);
    assert_eq!(store_of(&store, memory(SIZES), "cd").missing(&[name(1)]).unwrap(), [true]);
    let mut out = vec![0.5f32; lying.len()];
    assert!(matches!(pages.load(vec![(moved, &mut out[..])], 1)[..], [Ok(None)]));
    assert!(out.iter().all(|&x| x == 0.5));
}

#[test]
fn damaged_and_exchanged_pages_are_refused_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let pages = store_of(&in_folder(folder.path()), memory(SIZES), "ab");
    let sequence = sequence::<f32>();
    for index in [1, 2] {
        pages.save(vec![(name(index), &filled(&memory(SIZES), &sequence, index))], 1.0, 1).unwrap();
    }
    let path = |index| folder.path().join(pages.name(&name(index)).to_string());
    let mut out = vec![0.5f32; memory(SIZES).n_numbers()];
    // The page of other tokens under this one's name.
    fs::remove_file(path(1)).unwrap();
    fs::copy(path(2), path(1)).unwrap();
    let loaded = pages.load(vec![(name(1), &mut out[..])], 1);
    assert!(matches!(loaded[..], [Err(PageError::Store(StoreError::Mismatch { .. }))]));
    assert!(!path(1).exists());
    let mut bytes = fs::read(path(2)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(path(2)).unwrap();
    fs::write(path(2), bytes).unwrap();
    let loaded = pages.load(vec![(name(2), &mut out[..])], 1);
    assert!(matches!(loaded[..], [Err(PageError::Store(StoreError::Damaged { .. }))]));
    assert!(!path(2).exists());
    assert!(out.iter().all(|&x| x == 0.5));
}

#[test]
fn what_cannot_be_coded_is_refused_and_not_kept() {
    let store = Arc::new(PrefixStore::open("memory://", Options::default()).unwrap());
    let pages = store_of(&store, memory(SIZES), "ab");
    let mut lying = filled(&memory(SIZES), &sequence::<f32>(), 1);
    let inside = PageName { first_position: N_TOKENS + 1, ..name(1) };
    assert!(matches!(
        pages.save(vec![(inside, &lying)], 1.0, 1),
        Err(PageError::Cache(CacheError::Shape { .. }))
    ));
    let short = lying[..memory(SIZES).n_numbers() - 1].to_vec();
    assert!(matches!(
        pages.save(vec![(name(1), &short)], 1.0, 1),
        Err(PageError::Cache(CacheError::Buffer { .. }))
    ));
    lying[77] = f32::NAN;
    assert!(matches!(
        pages.save(vec![(name(1), &lying)], 1.0, 1),
        Err(PageError::Cache(CacheError::Codec(_)))
    ));
    assert_eq!(pages.missing(&[name(1)]).unwrap(), [true]);
}

#[test]
fn numbers_that_coding_changes_too_much_are_not_kept() {
    let store = Arc::new(PrefixStore::open("memory://", Options::default()).unwrap());
    let pages = store_of(&store, memory(SIZES), "ab");
    let lying = filled(&memory(SIZES), &sequence::<f32>(), 1);
    let saved = pages.save(vec![(name(1), &lying)], 1e-6, 1).unwrap();
    assert!(saved[0].n_bytes == 0 && saved[0].changed > 1e-6, "{saved:?}");
    assert_eq!(pages.missing(&[name(1)]).unwrap(), [true]);
    let zeros = vec![0.0f32; lying.len()];
    assert!(pages.save(vec![(name(1), &zeros)], 1.0, 1).unwrap()[0].changed.is_finite());
}

#[test]
fn a_container_of_another_shape_is_refused() {
    let found = Container::from_bytes(common::file().into()).unwrap();
    let mut out = [vec![0.0f32; N_NUMBERS], vec![0.0; N_NUMBERS]];
    let [keys, values] = &mut out;
    assert!(codec().decode(&found, [keys, values]).is_err());
}

proptest! {
    /// Any order of the places, and any order of layers, workers, heads and blocks.
    #[test]
    fn whatever_the_order_all_numbers_come_back(seed: u64, axes in Just(vec![0, 1, 2, 3]).prop_shuffle()) {
        let sizes = PageSizes {
            n_layers: 2, n_workers: 3, n_heads: 2, n_blocks: 2, block_tokens: 4, head_dim: 3,
        };
        let counts = [sizes.n_layers, sizes.n_workers, sizes.n_heads, sizes.n_blocks];
        let mut random = fastrand::Rng::with_seed(seed);
        let mut places: Vec<usize> = (0..2 * 4 * 3).collect();
        random.shuffle(&mut places);
        let mut strides = [0; 4];
        let mut step = places.len();
        for axis in axes {
            strides[axis] = step;
            step *= counts[axis];
        }
        let memory = PageMemory::new(sizes, strides, places.clone()).unwrap();
        let lying: Vec<f32> = (0..memory.n_numbers() as u32).map(|n| n as f32).collect();
        let [keys, values] = memory.gather(&lying).unwrap();
        // Layer 1, worker 2, its head 0, block 1, token 3, component 2 of the values.
        let head = 2 * sizes.n_heads;
        let at = ((sizes.n_workers * sizes.n_heads + head) * 2 + 1) * 4 * 3 + 3 * 3 + 2;
        let expected = strides[0] + 2 * strides[1] + strides[3] + places[4 * 3 + 3 * 3 + 2];
        prop_assert_eq!(values[at], expected as f32);
        let mut again = vec![0.0; lying.len()];
        memory.scatter([&keys, &values], &mut again).unwrap();
        prop_assert_eq!(again, lying);
    }
}

#[test]
fn places_that_overlap_or_lie_outside_are_refused() {
    let places: Vec<usize> = (0..2 * 16 * DIM).collect();
    let head = places.len();
    let block = HEADS * head;
    let right = [2 * block, 0, head, block];
    assert!(PageMemory::new(SIZES, right, places.clone()).is_ok());
    for strides in [[2 * block, 0, head, 0], [3 * block, 0, head, block], [usize::MAX, 0, head, block]] {
        assert!(PageMemory::new(SIZES, strides, places.clone()).is_err(), "{strides:?}");
    }
    assert!(PageMemory::new(SIZES, right, places[1..].to_vec()).is_err());
    assert!(PageMemory::new(SIZES, right, vec![3; head]).is_err());
    assert!(PageMemory::new(PageSizes { n_layers: 0, ..SIZES }, right, places.clone()).is_err());
    assert!(PageMemory::new(PageSizes { n_layers: usize::MAX, ..SIZES }, right, places).is_err());
}
