//! The longest stored prefix is found, whatever else lies in a store, and nothing that is not it.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{BLOCK_BYTES, BLOCK_LEN, bytes};
use kvlathe_cache::{Block, Bytes};
use kvlathe_codec::{Digest, Side, StreamId};
use kvlathe_prefix::blocking::PrefixStore;
use kvlathe_prefix::container::{Contents, Dtype, Header, LayerHeader, SideContents, SideHeader, to_bytes};
use kvlathe_prefix::store::{Evicted, Found, Options, Wanted};
use kvlathe_prefix::{Chunk, ChunkName, Dependencies, Part, Scope, StoreError};
use proptest::prelude::*;

const CHUNK_LEN: usize = 2 * BLOCK_LEN;
const FULL: Wanted = Wanted { full: true, window: None };

fn preset() -> Digest {
    Digest::from(std::array::from_fn(|i| i as u8))
}

fn scope_of(weights: &str, extra: &[u8], secret: &[u8]) -> Scope {
    Scope::new(&Dependencies { preset: preset(), weights, extra, chunk_len: CHUNK_LEN }, secret)
}

fn scope() -> Scope {
    scope_of("ab", b"", b"")
}

fn ids(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 3 + 1).collect()
}

/// A chunk's file, of one layer without sinks.
fn file(chunk: &Chunk<'_>, part: Part) -> Bytes {
    let side = SideHeader {
        head_dim: 4,
        first: chunk.start(),
        n_sinks: 0,
        n_blocks: 2,
        block_bytes: BLOCK_BYTES,
        n_tail: 0,
    };
    let layer = LayerHeader {
        n_heads: 2,
        dtype: Dtype::F32,
        model_dtypes: [Dtype::F32; 2],
        n_sinks: 0,
        window: (part == Part::Window).then_some(20),
        padding: None,
        key: side,
        value: side,
    };
    let header = Header {
        preset: preset(),
        n_tokens: chunk.end(),
        batch: 1,
        first_token_id: chunk.start(),
        chunk_key: chunk.key.to_string(),
        compress_start_len: 0,
        uncompressed_tail: 0,
        layers: vec![Some(layer)],
        ..common::header()
    };
    let blocks = |side: Side| {
        let block = |index: usize| Block {
            id: StreamId { digest: preset(), layer: 0, side },
            first_position: chunk.start() + index * BLOCK_LEN,
            bytes: bytes(BLOCK_BYTES, chunk.start() + index).into(),
        };
        SideContents { sinks: &[], blocks: vec![vec![block(0), block(1)]], tail: &[] }
    };
    let layers = vec![[blocks(Side::Key), blocks(Side::Value)]];
    to_bytes(&Contents { header, token_ids: Some(chunk.token_ids), layers }).unwrap()
}

fn save(store: &PrefixStore, scope: &Scope, ids: &[u32], part: Part) {
    let chunks = Chunk::all(scope, ids);
    store.put(chunks.iter().map(|chunk| (chunk.name(part), file(chunk, part))).collect()).unwrap();
}

fn find(store: &PrefixStore, scope: &Scope, ids: &[u32], wanted: Wanted) -> Found {
    store.find(&Chunk::all(scope, ids), wanted).unwrap()
}

fn in_memory() -> PrefixStore {
    PrefixStore::open("memory://", Options::default()).unwrap()
}

fn in_folder(folder: &Path, options: Options) -> PrefixStore {
    PrefixStore::open(url::Url::from_file_path(folder).unwrap().as_str(), options).unwrap()
}

#[test]
fn the_longest_prefix_is_found_and_no_longer_one() {
    let folder = tempfile::tempdir().unwrap();
    for store in [in_memory(), in_folder(folder.path(), Options::default())] {
        let scope = scope();
        save(&store, &scope, &ids(5 * CHUNK_LEN), Part::Full);
        for (n_tokens, n_chunks) in [(0, 0), (CHUNK_LEN - 1, 0), (3 * CHUNK_LEN + 4, 3), (7 * CHUNK_LEN, 5)] {
            let found = find(&store, &scope, &ids(n_tokens), FULL);
            assert_eq!((found.n_chunks, found.full.len(), found.window.len()), (n_chunks, n_chunks, 0));
            assert!(found.trouble.is_none());
        }
        let found = find(&store, &scope, &ids(2 * CHUNK_LEN), FULL);
        let block =
            &found.full[1].blocks(kvlathe_prefix::container::Place { layer: 0, side: Side::Value }, 0)[1];
        assert_eq!(block.first_position, CHUNK_LEN + BLOCK_LEN);
        assert_eq!(block.bytes, bytes(BLOCK_BYTES, CHUNK_LEN + 1));
        // Three lookups have found something; nobody waited for that to be noted.
        let deadline = SystemTime::now() + Duration::from_secs(10);
        while SystemTime::now() < deadline && store.hits(&scope.name()).unwrap() != Some(3) {}
        assert_eq!(store.hits(&scope.name()).unwrap(), Some(3));
        // Another token in the second chunk: the first one is all that is common.
        let mut other = ids(4 * CHUNK_LEN);
        other[CHUNK_LEN + 3] += 1;
        assert_eq!(find(&store, &scope, &other, FULL).n_chunks, 1);
    }
}

#[test]
fn what_is_not_there_yet_is_named() {
    let (store, scope) = (in_memory(), scope());
    save(&store, &scope, &ids(2 * CHUNK_LEN), Part::Full);
    let ids = ids(4 * CHUNK_LEN);
    let names: Vec<ChunkName> = Chunk::all(&scope, &ids).iter().map(|chunk| chunk.name(Part::Full)).collect();
    assert_eq!(store.missing(&names).unwrap(), [false, false, true, true]);
}

#[test]
fn other_weights_presets_extras_and_tenants_find_nothing() {
    let store = in_memory();
    save(&store, &scope(), &ids(3 * CHUNK_LEN), Part::Full);
    let longer = Dependencies { preset: preset(), weights: "ab", extra: b"", chunk_len: 3 * CHUNK_LEN };
    let other = Dependencies { preset: Digest::from([9; 32]), chunk_len: CHUNK_LEN, ..longer };
    for scope in [
        scope_of("a", b"b", b""),
        scope_of("", b"ab", b""),
        scope_of("ab", b"image", b""),
        scope_of("ab", b"", b"tenant"),
        Scope::new(&longer, b""),
        Scope::new(&other, b""),
    ] {
        assert_eq!(find(&store, &scope, &ids(3 * CHUNK_LEN), FULL).n_chunks, 0, "{scope:?}");
    }
    assert_eq!(find(&store, &scope(), &ids(3 * CHUNK_LEN), FULL).n_chunks, 3);
}

#[test]
fn windows_are_needed_near_the_end_only() {
    let (store, scope) = (in_memory(), scope());
    let all = ids(6 * CHUNK_LEN);
    save(&store, &scope, &all, Part::Full);
    let chunks = Chunk::all(&scope, &all);
    let put = |indices: &[usize]| {
        let of = |&index: &usize| (chunks[index].name(Part::Window), file(&chunks[index], Part::Window));
        store.put(indices.iter().map(of).collect()).unwrap();
    };
    // A query behind chunk n sees 19 tokens: chunks n and n - 1.
    let wanted = Wanted { full: true, window: Some(20) };
    let counts = |wanted| {
        let found = find(&store, &scope, &all, wanted);
        (found.n_chunks, found.full.len(), found.window.len())
    };
    assert_eq!(counts(wanted), (0, 0, 0));
    put(&[0]);
    assert_eq!(counts(wanted), (1, 1, 1));
    put(&[2, 3]);
    assert_eq!(counts(wanted), (4, 4, 2));
    put(&[5]);
    assert_eq!(counts(wanted), (4, 4, 2));
    put(&[4]);
    assert_eq!(counts(wanted), (6, 6, 2));
    assert_eq!(counts(Wanted { full: false, window: Some(CHUNK_LEN + 1) }), (6, 0, 1));
    assert_eq!(counts(Wanted { full: true, window: Some(1000) }), (1, 1, 1));
}

#[test]
fn what_is_damaged_or_renamed_is_a_miss_once_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = in_folder(folder.path(), Options::default());
    let (scope, all) = (scope(), ids(4 * CHUNK_LEN));
    let paths: Vec<_> = Chunk::all(&scope, &all)
        .iter()
        .map(|chunk| folder.path().join(chunk.name(Part::Full).to_string()))
        .collect();
    type Damage = fn(&Path, &Path);
    let broken: [(&str, Damage); 4] = [
        ("checksum", |path, _| {
            let mut file = fs::read(path).unwrap();
            *file.last_mut().unwrap() ^= 1;
            fs::write(path, file).unwrap();
        }),
        ("cut short", |path, _| fs::File::options().write(true).open(path).unwrap().set_len(100).unwrap()),
        ("saved cache", |path, _| fs::write(path, b"something else that is long enough").unwrap()),
        ("another chunk", |path, other| {
            fs::copy(other, path).unwrap();
        }),
    ];
    for (words, damage) in broken {
        save(&store, &scope, &all, Part::Full);
        damage(&paths[2], &paths[1]);
        let found = find(&store, &scope, &all, FULL);
        assert_eq!(found.n_chunks, 2);
        assert!(found.trouble.unwrap().to_string().contains(words), "{words}");
        let found = find(&store, &scope, &all, FULL);
        assert!(found.n_chunks == 2 && found.trouble.is_none() && !paths[2].exists());
    }
}

#[test]
fn no_changed_byte_is_ever_read() {
    let store = in_memory();
    let (scope, all) = (scope(), ids(4 * CHUNK_LEN));
    let chunks = Chunk::all(&scope, &all);
    let mut random = fastrand::Rng::with_seed(5);
    save(&store, &scope, &all, Part::Full);
    for _ in 0..10_000 {
        let index = random.usize(0..chunks.len());
        let mut damaged = file(&chunks[index], Part::Full).to_vec();
        let at = random.usize(0..damaged.len());
        damaged[at] ^= random.u8(1..=255);
        let name = chunks[index].name(Part::Full);
        store.put(vec![(name.clone(), damaged.into())]).unwrap();
        let found = find(&store, &scope, &all, FULL);
        assert_eq!(found.n_chunks, index);
        assert!(found.trouble.is_some());
        store.put(vec![(name, file(&chunks[index], Part::Full))]).unwrap();
    }
    assert_eq!(find(&store, &scope, &all, FULL).n_chunks, chunks.len());
}

#[test]
fn eviction_takes_what_was_used_longest_ago_and_ends_before_beginnings() {
    let folder = tempfile::tempdir().unwrap();
    let scope = scope();
    let unlimited = in_folder(folder.path(), Options::default());
    let (old, new) = (ids(3 * CHUNK_LEN), ids(4 * CHUNK_LEN).split_off(CHUNK_LEN));
    for (ids, age) in [(&old, 100), (&new, 10)] {
        save(&unlimited, &scope, ids, Part::Full);
        let used_at = SystemTime::now() - Duration::from_secs(age);
        for chunk in Chunk::all(&scope, ids) {
            let path = folder.path().join(chunk.name(Part::Full).to_string());
            fs::File::options().append(true).open(path).unwrap().set_modified(used_at).unwrap();
        }
    }
    let n_bytes = unlimited.list().unwrap()[0].1.n_bytes;
    let limited = |max_bytes, max_age| {
        in_folder(folder.path(), Options { max_bytes, max_age, ..Options::default() }).evict().unwrap()
    };
    assert_eq!(limited(None, None), Evicted::default());
    assert_eq!(limited(Some(6 * n_bytes), None), Evicted::default());
    assert_eq!(limited(Some(4 * n_bytes), None), Evicted { n_objects: 2, n_bytes: 2 * n_bytes });
    assert_eq!(find(&unlimited, &scope, &old, FULL).n_chunks, 1);
    assert_eq!(find(&unlimited, &scope, &new, FULL).n_chunks, 3);
    // What was found just now is young; noting that is not waited for.
    let deadline = SystemTime::now() + Duration::from_secs(10);
    while SystemTime::now() < deadline && limited(None, Some(Duration::from_secs(5))).n_objects > 0 {}
    assert!(unlimited.list().unwrap().len() <= 4);
}

#[test]
fn what_others_keep_in_the_folder_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Options { max_bytes: Some(0), ..Options::default() };
    let store = in_folder(folder.path(), limits);
    save(&store, &scope(), &ids(CHUNK_LEN), Part::Full);
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    fs::write(folder.path().join("v1/notes-1.kvl"), "mine").unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.evict().unwrap().n_objects, 1);
    assert!(folder.path().join("notes.txt").exists() && folder.path().join("v1/notes-1.kvl").exists());
}

#[test]
fn urls_that_name_no_store_say_what_is_expected() {
    for (url, words) in [
        ("folder/here", "file:///folder"),
        ("file://host.example/folder", "three slashes"),
        ("gopher://host/x", "gopher"),
    ] {
        let error = PrefixStore::open(url, Options::default()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn no_message_holds_credentials() {
    let store = PrefixStore::open("memory://name:hunter2@host/?token=hunter2", Options::default()).unwrap();
    assert!(!format!("{store:?} {}", store.url()).contains("hunter2"));
    let error = PrefixStore::open("name:hunter2@host", Options::default()).unwrap_err();
    assert!(
        matches!(error, StoreError::Url { .. }) && !format!("{error} {error:?}").contains("hunter2"),
        "{error}"
    );
    let error =
        PrefixStore::open("gopher://name:hunter2@host/x?token=hunter2", Options::default()).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
}

proptest! {
    #[test]
    fn only_names_that_we_give_are_read(text in "(v1/)?[0-9a-f/]{30,34}/?[0-9a-f.-]{60,80}(-w)?(.kvl)?") {
        if let Some(name) = ChunkName::parse(&text) {
            prop_assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn keys_tell_all_sequences_apart(a in prop::collection::vec(0_u32..3, 0..40), b in prop::collection::vec(0_u32..3, 0..40)) {
        let scope = scope();
        let (keys_a, keys_b) = (scope.keys(&a), scope.keys(&b));
        prop_assert_eq!(keys_a.len(), a.len() / CHUNK_LEN);
        for (n, (key_a, key_b)) in keys_a.iter().zip(&keys_b).enumerate() {
            let end = (n + 1) * CHUNK_LEN;
            prop_assert_eq!(key_a == key_b, a[..end] == b[..end]);
        }
    }
}

#[test]
fn a_key_is_what_the_page_says() {
    // Made from the formula in docs/container_format.md, step by step.
    let secret = blake3::derive_key("kvlathe 2026-11 keys of stored prefixes, version 1", b"s");
    let mut root = preset().as_bytes().to_vec();
    root.extend((CHUNK_LEN as u64).to_le_bytes());
    root.extend([2, 0, 0, 0, 0, 0, 0, 0]);
    root.extend(b"ab");
    root.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    root.extend(b"x");
    let root = blake3::keyed_hash(&secret, &root);
    let mut first = root.as_bytes().to_vec();
    first.extend(ids(CHUNK_LEN).iter().flat_map(|id| id.to_le_bytes()));
    let scope = scope_of("ab", b"x", b"s");
    assert_eq!(scope.name(), root.to_hex()[..32]);
    assert_eq!(scope.keys(&ids(CHUNK_LEN))[0].to_string(), blake3::keyed_hash(&secret, &first).to_string());
}
