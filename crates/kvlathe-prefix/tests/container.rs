//! What is written is read again, byte by byte, and lies where attention can read it.

mod common;

use std::fs;

use common::{BATCH, file, header, made, open, token_ids};
use kvlathe_codec::{Digest, Side};
use kvlathe_prefix::container::{Container, ContainerError, Place, write};

#[test]
fn all_comes_back() {
    let made = made();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.kvl");
    write(&path, &made.contents(&token_ids())).unwrap();
    let found = Container::open(&path).unwrap();
    assert_eq!(found.header(), &made.header);
    assert_eq!(found.token_ids(), Some(token_ids()));
    for (at, layer) in [0, 2].into_iter().enumerate() {
        for (s, side) in Side::ALL.into_iter().enumerate() {
            let place = Place { layer, side };
            assert_eq!(found.sinks(place), made.exact[at][s][0]);
            assert_eq!(found.tail(place), made.exact[at][s][1]);
            for row in 0..BATCH {
                let blocks = found.blocks(place, row);
                assert_eq!(blocks, made.blocks[at][s][row]);
                assert!(blocks.iter().all(|block| block.bytes.as_ptr().addr().is_multiple_of(64)));
            }
        }
    }
    // A layer that holds nothing, and rows and layers that are not there.
    for (layer, row) in [(1, 0), (9, 0), (0, BATCH)] {
        let place = Place { layer, side: Side::Key };
        assert!(found.blocks(place, row).is_empty());
    }
    assert!(found.tail(Place { layer: 1, side: Side::Value }).is_empty());
    // What is shared lies in the file once, and is one block for whoever counts addresses.
    let [first, second] =
        [0, 1].map(|row| found.blocks(Place { layer: 0, side: Side::Key }, row)[0].bytes.as_ptr());
    assert_eq!(first, second);
}

#[test]
fn a_window_that_dropped_tokens_has_its_blocks_at_their_positions() {
    let found = open(file()).unwrap();
    let blocks = found.blocks(Place { layer: 2, side: Side::Value }, 1);
    assert_eq!(blocks.iter().map(|block| block.first_position).collect::<Vec<_>>(), [8, 16]);
}

#[test]
fn without_token_ids() {
    let mut made = made();
    made.header.has_token_ids = false;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.kvl");
    let ids = token_ids();
    let mut contents = made.contents(&ids);
    assert!(matches!(write(&path, &contents), Err(ContainerError::Contents { .. })));
    contents.token_ids = None;
    write(&path, &contents).unwrap();
    let found = Container::open(&path).unwrap();
    assert_eq!(found.token_ids(), None);
    assert_eq!(found.blocks(Place { layer: 0, side: Side::Key }, 1), made.blocks[0][0][1]);
}

#[test]
fn contents_unlike_their_header_are_refused_and_the_old_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.kvl");
    let (made, ids) = (made(), token_ids());
    write(&path, &made.contents(&ids)).unwrap();
    let before = fs::read(&path).unwrap();
    let short = &made.exact[0][0][0][1..];
    let mut broken = vec![made.contents(&ids[1..]); 7];
    broken[1].layers.pop();
    broken[2].layers[0][0].sinks = short;
    broken[3].layers[0][1].blocks[1].pop();
    broken[4].layers[0][1].blocks[0].swap(0, 1);
    broken[5].header.preset = Digest::from([9; 32]);
    broken[6].header.n_tokens += 1;
    for contents in &broken {
        let error = write(&path, contents).unwrap_err();
        let is_named = matches!(
            error,
            ContainerError::Contents { .. } | ContainerError::Block { .. } | ContainerError::Header { .. }
        );
        assert!(is_named, "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_folder_and_nothing_at_all_are_no_containers() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("none")] {
        let error = Container::open(&path).unwrap_err();
        assert!(matches!(error, ContainerError::Io { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
}

#[test]
fn files_of_others_are_told_apart() {
    for (content, expected) in [
        (&b""[..], "empty"),
        (b"PK\x03\x04 something", "zip"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"{\"a\": 1}", "JSON"),
        (b"\x20\0\0\0\0\0\0\0{\"x\": []}", "safetensors"),
        (b"\x89KVL\n\x1a\n and so on", "other bytes"),
    ] {
        let error = open(content.to_vec()).unwrap_err();
        assert!(
            matches!(error, ContainerError::Foreign { .. }) && error.to_string().contains(expected),
            "{error}"
        );
    }
}

#[test]
fn a_newer_file_says_so() {
    let mut file = file();
    file[8] = 2;
    let error = open(file).unwrap_err();
    assert!(matches!(error, ContainerError::Newer { given: 2 }), "{error}");
}

#[test]
fn unknown_keys_are_ignored() {
    let mut json: serde_json::Value = serde_json::from_slice(&header().to_json().unwrap()).unwrap();
    json["comes later"] = 1.into();
    json["layers"][0]["key"]["too"] = "yes".into();
    let read = kvlathe_prefix::container::Header::from_json(json.to_string().as_bytes()).unwrap();
    assert_eq!(read, header());
}

/// `KVLATHE_BLESS=1` writes the file anew. Do that only together with a new version of the format.
#[test]
fn the_golden_file_stays_readable() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/container-v1.kvl");
    if std::env::var_os("KVLATHE_BLESS").is_some() {
        fs::write(path, file()).unwrap();
    }
    assert_eq!(fs::read(path).unwrap(), file());
    let found = Container::open(path).unwrap();
    assert_eq!((found.header(), found.token_ids()), (&header(), Some(token_ids())));
}
