//! Damaged, cut and hostile files: always an error that names what is wrong, never a panic or other contents.

mod common;

use std::sync::LazyLock;

use common::{file, header, open, resealed, u64_at};
use kvlathe_codec::Side;
use kvlathe_prefix::container::{ContainerError, Part, Place};
use proptest::prelude::*;

static FILE: LazyLock<Vec<u8>> = LazyLock::new(file);

#[test]
fn every_bit_counts() {
    for at in 0..FILE.len() {
        for bit in [0, 5] {
            let mut damaged = FILE.clone();
            damaged[at] ^= 1 << bit;
            let error = open(damaged).expect_err(&format!("byte {at}"));
            let fits = match at {
                0..8 => matches!(error, ContainerError::Foreign { .. }),
                8..12 => matches!(error, ContainerError::Newer { .. } | ContainerError::Damaged { .. }),
                12..64 => matches!(error, ContainerError::Damaged { part: Part::Prelude, .. }),
                _ => matches!(error, ContainerError::Damaged { .. }),
            };
            assert!(fits, "byte {at}: {error}");
        }
    }
}

/// Bytes 64 to the first piece are the header; then the pieces, in the order of the table.
#[test]
fn the_error_names_the_piece() {
    let json = u64_at(&FILE, 24) as usize;
    let entry = |n: usize| u64_at(&FILE, 64 + json + 24 * n) as usize;
    let key = Place { layer: 0, side: Side::Key };
    let window = Place { layer: 2, side: Side::Value };
    for (at, part) in [
        (64, Part::Header),
        (64 + json, Part::Header),
        (entry(0) - 1, Part::Header),
        (entry(0), Part::TokenIds),
        (entry(1), Part::Sinks(key)),
        (entry(2), Part::Tail(key)),
        (entry(3) + 26, Part::Block { place: key, row: 0, index: 0 }),
        // What fills a block up to 64 bytes is the block's as well.
        (entry(4) + 63, Part::Block { place: key, row: 0, index: 1 }),
        (entry(8), Part::Block { place: key, row: 1, index: 2 }),
        (FILE.len() - 1, Part::Block { place: window, row: 1, index: 1 }),
    ] {
        let mut damaged = FILE.clone();
        damaged[at] ^= 0x40;
        match open(damaged) {
            Err(ContainerError::Damaged { part: found, .. }) => assert_eq!(found, part, "byte {at}"),
            other => panic!("byte {at}: {other:?}"),
        }
    }
    let text = Part::Block { place: key, row: 1, index: 2 }.to_string();
    assert_eq!(text, "block 2 of row 1 (layer 0, keys)");
}

#[test]
fn every_truncation_and_every_addition_is_refused() {
    for len in 0..FILE.len() {
        let error = open(FILE[..len].to_vec()).expect_err(&format!("{len} bytes"));
        let is_short = matches!(error, ContainerError::Length { .. });
        assert!(is_short || len == 0, "{len} bytes: {error}");
    }
    for more in [1, 64, 4096] {
        let error = open([&FILE[..], &vec![0; more]].concat()).unwrap_err();
        assert!(matches!(error, ContainerError::Length { .. }), "{error}");
    }
}

/// Changes the table's entry `n` and makes the checksums right again.
fn with_entry(n: usize, change: impl Fn(&mut [u8])) -> Result<(), ContainerError> {
    let mut file = FILE.clone();
    let at = 64 + u64_at(&file, 24) as usize + 24 * n;
    change(&mut file[at..at + 24]);
    open(resealed(file)).map(drop)
}

#[test]
fn a_table_cannot_point_elsewhere() {
    let set = |at: usize, value: u64| {
        move |entry: &mut [u8]| entry[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    let fourth = u64_at(&FILE, 64 + u64_at(&FILE, 24) as usize + 24 * 4);
    for value in
        [0, 1, 64, fourth + 1, fourth - 64, fourth + 64, FILE.len() as u64, u64::MAX, u64::MAX - 63, 1 << 63]
    {
        let error = with_entry(4, set(0, value)).unwrap_err();
        assert!(
            matches!(error, ContainerError::Piece { .. } | ContainerError::Damaged { .. }),
            "{value}: {error}"
        );
    }
    for value in [0, 26, 28, u64::MAX] {
        let error = with_entry(4, set(8, value)).unwrap_err();
        assert!(matches!(error, ContainerError::Piece { .. }), "{value}: {error}");
    }
}

/// Another header with right checksums; the pieces are those of the old one.
fn with_header(change: impl Fn(&mut serde_json::Value)) -> Result<(), ContainerError> {
    let mut json: serde_json::Value = serde_json::from_slice(&header().to_json().unwrap()).unwrap();
    change(&mut json);
    let json = json.to_string().into_bytes();
    let old_json = u64_at(&FILE, 24) as usize;
    let n_pieces = u64_at(&FILE, 32) as usize;
    let old_end = (64 + old_json + 24 * n_pieces).next_multiple_of(64);
    let end = (64 + json.len() + 24 * n_pieces).next_multiple_of(64);
    let mut file = FILE[..64].to_vec();
    file[24..32].copy_from_slice(&(json.len() as u64).to_le_bytes());
    file.extend(&json);
    for entry in FILE[64 + old_json..].chunks(24).take(n_pieces) {
        file.extend((u64_at(entry, 0) + end as u64 - old_end as u64).to_le_bytes());
        file.extend(&entry[8..]);
    }
    file.resize(end, 0);
    file.extend(&FILE[old_end..]);
    let n_bytes = file.len() as u64;
    file[16..24].copy_from_slice(&n_bytes.to_le_bytes());
    open(resealed(file)).map(drop)
}

#[test]
fn impossible_headers_are_refused() {
    with_header(|_| ()).unwrap();
    let huge = u64::MAX / 2;
    let changes: [(&str, serde_json::Value); 24] = [
        ("/n_tokens", 31.into()),
        ("/n_tokens", 0.into()),
        ("/n_tokens", huge.into()),
        ("/n_tokens", (-1).into()),
        ("/n_tokens", "30".into()),
        ("/batch", 0.into()),
        ("/batch", 3.into()),
        ("/batch", huge.into()),
        ("/block_len", 7.into()),
        ("/block_len", 16.into()),
        ("/preset", "ab".into()),
        ("/layers", serde_json::Value::Array(Vec::new())),
        ("/layers/1", 5.into()),
        ("/layers/0/n_heads", 3.into()),
        ("/layers/0/n_heads", 0.into()),
        ("/layers/0/dtype", "float64".into()),
        ("/layers/0/dtype", "bfloat16".into()),
        ("/layers/0/padding", vec![1].into()),
        ("/layers/0/padding/1", 31.into()),
        ("/layers/2/window", 0.into()),
        ("/layers/2/key/first", huge.into()),
        ("/layers/2/key/n_blocks", huge.into()),
        ("/layers/2/value/block_bytes", 0.into()),
        ("/has_token_ids", false.into()),
    ];
    for (at, value) in changes {
        let error = with_header(|json| *json.pointer_mut(at).unwrap() = value.clone());
        let error = error.expect_err(&format!("{at} = {value}"));
        let is_named = matches!(error, ContainerError::Header { .. } | ContainerError::Piece { .. });
        assert!(is_named, "{at} = {value}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Right checksums and anything else wrong: what opens can be read without a panic.
    #[test]
    fn resealed_damage_never_panics(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = FILE.clone();
        // Header and table: pieces have checksums in the table.
        let end = (64 + u64_at(&file, 24) as usize + 24 * u64_at(&file, 32) as usize).next_multiple_of(64);
        for (at, byte) in flips {
            file[12 + at.index(end - 12)] ^= byte;
        }
        if let Some(cut) = cut {
            file.truncate(64 + cut.index(file.len() - 64));
            let n_bytes = file.len() as u64;
            file[16..24].copy_from_slice(&n_bytes.to_le_bytes());
        }
        let file = if u64_at(&file, 24) < 1 << 20 && u64_at(&file, 32) < 1 << 20 { resealed(file) } else { file };
        if let Ok(found) = open(file) {
            for layer in 0..found.header().layers.len() {
                for side in Side::ALL {
                    for row in 0..found.header().batch {
                        let n_blocks = found.blocks(Place { layer, side }, row).len();
                        prop_assert!(n_blocks < 100);
                    }
                    drop((found.sinks(Place { layer, side }), found.tail(Place { layer, side }), found.token_ids()));
                }
            }
        }
    }
}
