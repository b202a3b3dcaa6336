//! A saved cache's file: any bytes, and any bytes whose checksums are right, so that everything behind them is reached.

use kvlathe::cache::Bytes;
use kvlathe::codec::Side;
use kvlathe::prefix::container::{Container, Header, Place};
use kvlathe::prefix::{Chunk, Dependencies, Scope};

/// Bytes of an entry of the table.
const ENTRY: usize = 24;

pub(crate) fn run(bytes: &[u8]) {
    look(bytes.to_vec());
    look(sealed(bytes.to_vec()));
}

/// What opens holds what its header says.
fn look(file: Vec<u8>) {
    let n_bytes = file.len();
    let Ok(found) = Container::from_bytes(Bytes::from(file)) else { return };
    let header = found.header();
    look_for_a_chunk(&found);
    let again = Header::from_json(&header.to_json().expect("a header")).expect("a valid header");
    assert_eq!(&again, header);
    assert_eq!(
        found.token_ids().map(|ids| ids.len()),
        header.has_token_ids.then(|| header.batch * (header.n_tokens - header.first_token_id))
    );
    for (layer, shape) in header.layers.iter().enumerate() {
        let Some(shape) = shape else { continue };
        for side in Side::ALL {
            let (place, of_side) = (Place { layer, side }, shape.side(side));
            let per_token = header.batch * shape.n_heads * of_side.head_dim * shape.dtype.n_bytes();
            assert_eq!(found.sinks(place).len(), of_side.n_sinks * per_token);
            assert_eq!(found.tail(place).len(), of_side.n_tail * per_token);
            assert!(of_side.n_blocks * ENTRY * header.batch <= n_bytes, "more blocks than entries");
            for row in 0..header.batch {
                let blocks = found.blocks(place, row);
                let ends = |at: usize| of_side.blocks_at(header.block_len) + at * header.block_len;
                assert!(blocks.iter().enumerate().all(|(at, block)| block.first_position == ends(at)));
                assert!(blocks.iter().all(|block| block.bytes.len() == of_side.block_bytes));
            }
        }
    }
}

/// Whatever is found is a chunk of its own tokens, if it says that it is, and of no others.
fn look_for_a_chunk(found: &Container) {
    let header = found.header();
    let Some(ids) = found.token_ids().filter(|ids| !ids.is_empty() && ids.len() < 1 << 12) else { return };
    let chunk_len = header.n_tokens - header.first_token_id;
    let scope = Scope::new(
        &Dependencies { preset: header.preset, weights: &header.weights, extra: b"", chunk_len },
        b"",
    );
    for chunk in Chunk::all(&scope, &ids) {
        let is_it = header.batch == 1
            && header.first_token_id == chunk.start()
            && header.chunk_key == chunk.key.to_string();
        assert_eq!(chunk.mismatch(found).is_none(), is_it);
    }
}

/// Its length and all of its checksums as they should be, as far as it says where they belong.
fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    if file.len() < 64 {
        return file;
    }
    file[..8].copy_from_slice(b"\x89KVL\r\n\x1a\n");
    file[8..12].copy_from_slice(&1_u32.to_le_bytes());
    let n_bytes = file.len() as u64;
    file[16..24].copy_from_slice(&n_bytes.to_le_bytes());
    let number = |file: &[u8], at: usize| {
        let bytes = file.get(at..at + 8)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok().filter(|n| *n <= file.len())
    };
    if let (Some(json), Some(n_pieces)) = (number(&file, 24), number(&file, 32)) {
        for at in (64 + json..).step_by(ENTRY).take(n_pieces) {
            let Some((start, len)) = number(&file, at).zip(number(&file, at + 8)) else { break };
            let Some(piece) = file.get(start..start + len.next_multiple_of(64)) else { continue };
            let crc = crc32fast::hash(piece);
            let Some(place) = file.get_mut(at + 16..at + 20) else { break };
            place.copy_from_slice(&crc.to_le_bytes());
        }
        let end = (64 + json + ENTRY * n_pieces).next_multiple_of(64);
        if let Some(described) = file.get(64..end) {
            let crc = crc32fast::hash(described);
            file[12..16].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let crc = crc32fast::hash(&file[..60]);
    file[60..64].copy_from_slice(&crc.to_le_bytes());
    file
}
