//! A small cache's contents, made of a formula.
#![allow(dead_code, reason = "each test takes its part")]

use kvlathe_cache::{Block, Bytes};
use kvlathe_codec::{Digest, Side, StreamId};
use kvlathe_prefix::container::{
    Container, Contents, Dtype, Header, LayerHeader, SideContents, SideHeader, write,
};

pub const BATCH: usize = 2;
pub const N_TOKENS: usize = 30;
pub const BLOCK_LEN: usize = 8;
pub const BLOCK_BYTES: usize = 27;

pub fn bytes(n: usize, seed: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + seed * 31 + i / 5) as u8).collect()
}

fn side(head_dim: usize) -> SideHeader {
    // Sinks 0 to 3, blocks at 0, 8 and 16, a tail from 24 on.
    SideHeader { head_dim, first: 0, n_sinks: 4, n_blocks: 3, block_bytes: BLOCK_BYTES, n_tail: 6 }
}

pub fn header() -> Header {
    let layer = LayerHeader {
        n_heads: 2,
        dtype: Dtype::F32,
        model_dtypes: [Dtype::F32, Dtype::Bf16],
        n_sinks: 4,
        window: None,
        padding: Some(vec![0, 3]),
        key: side(4),
        value: side(6),
    };
    // A window that has dropped what is before position 9: a placeholder in its first block.
    let windowed = SideHeader { first: 9, n_sinks: 0, n_blocks: 2, ..side(4) };
    let window = LayerHeader {
        dtype: Dtype::F16,
        window: Some(20),
        padding: None,
        key: windowed,
        value: windowed,
        ..layer.clone()
    };
    Header {
        library_version: "0.1.0".to_owned(),
        model: "made by formula".to_owned(),
        preset: Digest::from(std::array::from_fn(|i| i as u8)),
        fingerprint: String::new(),
        weights: "ab".repeat(32),
        n_tokens: N_TOKENS,
        batch: BATCH,
        block_len: BLOCK_LEN,
        has_token_ids: true,
        first_token_id: 0,
        chunk_key: String::new(),
        compress_start_len: 0,
        uncompressed_tail: 6,
        record_past: false,
        layers: vec![Some(layer), None, Some(window)],
    }
}

pub fn token_ids() -> Vec<u32> {
    (0..BATCH * N_TOKENS).map(|i| i as u32 * 3 + 100_000).collect()
}

/// Keys' and values' blocks of each row.
type LayerBlocks = [Vec<Vec<Block>>; 2];

/// Bytes of everything in `header`, by layer and side.
pub struct Made {
    pub header: Header,
    pub exact: Vec<[[Vec<u8>; 2]; 2]>,
    pub blocks: Vec<LayerBlocks>,
}

pub fn made() -> Made {
    let header = header();
    let mut exact = Vec::new();
    let mut blocks: Vec<LayerBlocks> = Vec::new();
    for (at, layer) in header.layers.iter().enumerate() {
        let Some(layer) = layer else { continue };
        let seed = |side: Side| 10 * at + usize::from(side == Side::Value);
        exact.push(Side::ALL.map(|side| {
            let shape = layer.side(side);
            [shape.n_sinks, shape.n_tail].map(|n| {
                bytes(BATCH * layer.n_heads * n * shape.head_dim * layer.dtype.n_bytes(), seed(side) + n)
            })
        }));
        blocks.push(Side::ALL.map(|side| {
            let (shape, id) = (layer.side(side), StreamId { digest: header.preset, layer: at, side });
            let row = |row: usize| {
                let block = |index: usize| Block {
                    id,
                    first_position: shape.blocks_at(BLOCK_LEN) + index * BLOCK_LEN,
                    bytes: Bytes::from(bytes(BLOCK_BYTES, seed(side) + 100 * row + index)),
                };
                (0..shape.n_blocks).map(block).collect()
            };
            (0..BATCH).map(row).collect()
        }));
    }
    // Rows of beams share their first blocks.
    blocks[0][0][1][0] = blocks[0][0][0][0].clone();
    Made { header, exact, blocks }
}

impl Made {
    pub fn contents<'a>(&'a self, ids: &'a [u32]) -> Contents<'a> {
        let side = |(exact, blocks): (&'a [Vec<u8>; 2], &Vec<Vec<Block>>)| SideContents {
            sinks: &exact[0],
            blocks: blocks.clone(),
            tail: &exact[1],
        };
        let layer = |(exact, blocks): (&'a [[Vec<u8>; 2]; 2], &LayerBlocks)| {
            [side((&exact[0], &blocks[0])), side((&exact[1], &blocks[1]))]
        };
        let layers = self.exact.iter().zip(&self.blocks).map(layer).collect();
        Contents { header: self.header.clone(), token_ids: Some(ids), layers }
    }
}

/// The file of it all.
pub fn file() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.kvl");
    write(&path, &made().contents(&token_ids())).unwrap();
    std::fs::read(path).unwrap()
}

pub fn open(file: Vec<u8>) -> Result<Container, kvlathe_prefix::container::ContainerError> {
    Container::from_bytes(Bytes::from(file))
}

/// The file with its checksums made right again.
pub fn resealed(mut file: Vec<u8>) -> Vec<u8> {
    let (json, pieces) = (u64_at(&file, 24) as usize, u64_at(&file, 32) as usize);
    let end = (64 + json + 24 * pieces).next_multiple_of(64);
    if let Some(described) = file.get(64..end) {
        let crc = crc32fast::hash(described);
        file[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32fast::hash(&file[..60]);
    file[60..64].copy_from_slice(&crc.to_le_bytes());
    file
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
