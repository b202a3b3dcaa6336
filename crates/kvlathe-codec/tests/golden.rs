//! Packed blocks of version 3 stay what they are: the encoders give the golden bytes, and the decoders what
//! `docs/block_format.md` says, computed here a second time, in f64 and without the library's tables.
//!
//! `KVLATHE_BLESS=1 cargo test -p kvlathe-codec --test golden` writes the file anew. Do that only together with a new
//! version of the format.

use std::path::PathBuf;

use kvlathe_codec::{
    Basis, Pairing, Rope, Scratch, StreamTables, Tokens, WIDTHS, Width, available_isas, reference,
};

const HEAD_DIM: usize = 16;
const BLOCK_LEN: usize = 32;
const INV_FREQ: [f64; 4] = [1.0, 0.25, 0.0625, 0.015_625];

/// One block of the file.
struct Golden {
    rotated: bool,
    /// Of the block's first slot.
    first_position: i64,
    /// Slots whose tokens are kept elsewhere.
    n_placeholders: usize,
}

/// As values (nothing is rotated), as keys, and as a sequence's first keys behind four sinks.
const BLOCKS: [Golden; 3] = [
    Golden { rotated: false, first_position: 1000, n_placeholders: 0 },
    Golden { rotated: true, first_position: 1000, n_placeholders: 0 },
    Golden { rotated: true, first_position: 0, n_placeholders: 4 },
];

impl Golden {
    /// Position that the block's keys are turned back by.
    fn centre(&self) -> i64 {
        self.first_position + BLOCK_LEN as i64 / 2
    }

    fn rope(&self) -> Option<Rope> {
        self.rotated.then(rope)
    }

    /// The tokens, zero where they are kept elsewhere.
    fn tokens(&self) -> Vec<f32> {
        let mut x = tokens();
        x[..self.n_placeholders * HEAD_DIM].fill(0.0);
        x
    }
}

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/block-v3.bin")
}

fn basis() -> Basis {
    let d = HEAD_DIM;
    let entry = |i: usize, j: usize| {
        let off_diagonal = ((i * 5 + j * 3) % 8) as f32 / 64.0 - 4.0 / 64.0;
        if i == j { 1.0 } else { off_diagonal }
    };
    Basis {
        mean: (0..d).map(|j| ((j * 7) % 16) as f32 / 32.0 - 0.25).collect(),
        synthesis: (0..d * d).map(|at| entry(at / d, at % d)).collect(),
        // The outlier's component and the one it turns with count most, so that its token takes steps which do not clip it.
        importance: (0..d).map(|i| if [2, 6].contains(&i) { 8.0 } else { 1.0 / (1 + i) as f32 }).collect(),
        widths: (0..d).map(|i| WIDTHS[(i * 5 + 5) % WIDTHS.len()]).collect(),
    }
}

fn rope() -> Rope {
    Rope::new(Pairing::HalfSplit, 2 * INV_FREQ.len(), INV_FREQ.to_vec()).unwrap()
}

/// Tokens of very different size, one of them zero, one with an outlier.
fn tokens() -> Vec<f32> {
    let component = |t: usize, j: usize| {
        let integer = ((t * 37 + j * 11 + t * j * 5) % 101) as i32 - 50;
        let shift = t % 5;
        match (t, j) {
            (3, _) => 0.0,
            (7, 2) => 4096.0,
            _ => (integer << shift) as f32 / 64.0,
        }
    };
    (0..BLOCK_LEN * HEAD_DIM).map(|at| component(at / HEAD_DIM, at % HEAD_DIM)).collect()
}

/// R(position) in f64.
fn rotate(x: &mut [f64], position: i64) {
    let half = INV_FREQ.len();
    for (i, frequency) in INV_FREQ.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (x[i], x[i + half]);
        x[i] = a * cos - b * sin;
        x[i + half] = b * cos + a * sin;
    }
}

/// The value of docs/block_format.md for one token, `[head_dim]`, rotated forward.
fn decoded_by_hand(packed: &[u8], basis: &Basis, block: &Golden, t: usize) -> Vec<f64> {
    const GUARDS: [f64; 16] =
        [0.75, 0.84, 0.92, 1.0, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6.0, 24.0, 256.0, 16384.0];
    let head = u16::from_le_bytes([packed[0], packed[1]]);
    let (fall, guard) = (i32::from(packed[2 + t] & 15), GUARDS[usize::from(packed[2 + t] >> 4)]);
    let gain_code = i32::from(head & 0xfff) - (fall << (head >> 12));
    let gain = if fall == 15 { 0.0 } else { (f64::from(gain_code.max(1) - 2048) / 32.0).exp2() };

    let mut x: Vec<f64> = basis.mean.iter().map(|&m| f64::from(m)).collect();
    if block.rotated {
        rotate(&mut x, t as i64 - BLOCK_LEN as i64 / 2);
    }
    let drift_at = 2 + BLOCK_LEN;
    let (mut plane, mut order) = (drift_at + HEAD_DIM / 2, 0);
    for (bits, step) in [(8usize, 0.0308), (4, 0.3352), (3, 0.586), (2, 0.9957), (1, 1.596), (0, 0.0)] {
        for i in (0..HEAD_DIM).filter(|&i| basis.widths[i].bits() == bits) {
            let run = |bits: usize, at: usize| {
                let len = BLOCK_LEN * bits / 8;
                usize::from(packed[at + t % len]) >> (bits * (t / len)) & ((1 << bits) - 1)
            };
            let mut z = 0.0;
            if bits > 0 {
                let code = if bits == 3 {
                    run(2, plane) + 4 * run(1, plane + BLOCK_LEN / 4)
                } else {
                    run(bits, plane)
                };
                z = step * guard * (code as f64 + 0.5 - (1u32 << (bits - 1)) as f64);
            }
            let byte = packed[drift_at + order % (HEAD_DIM / 2)];
            z += 0.1875 * (f64::from(if order < HEAD_DIM / 2 { byte & 15 } else { byte >> 4 }) - 8.0);
            for (j, xj) in x.iter_mut().enumerate() {
                *xj += f64::from(basis.synthesis[j * HEAD_DIM + i]) * z;
            }
            plane += BLOCK_LEN * bits / 8;
            order += 1;
        }
    }
    x.iter_mut().for_each(|v| *v *= gain);
    if block.rotated {
        rotate(&mut x, block.centre());
    }
    x
}

/// Encodes with the reference and every instruction set, checks that the bytes are equal, and returns them.
fn encode(block: &Golden, tables: &StreamTables) -> Vec<u8> {
    let x = block.tokens();
    let turn_back = block.rope().map(|rope| rope.rotation(-block.centre()));
    let mut frame = vec![0.0; x.len()];
    for (t, token) in x.chunks_exact(HEAD_DIM).enumerate() {
        (0..HEAD_DIM).for_each(|j| frame[j * BLOCK_LEN + t] = token[j]);
    }
    if let Some(rotation) = &turn_back {
        rotation.apply_component_major(&mut frame, BLOCK_LEN);
    }
    let expected = reference::encode(tables, &frame);
    for isa in available_isas() {
        let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
        let tokens = Tokens { data: &x, token_stride: HEAD_DIM };
        tables.encode_block(isa, tokens, turn_back.as_ref(), &mut packed, &mut scratch).unwrap();
        assert_eq!(packed, expected, "{}", isa.name());
    }
    expected
}

#[test]
fn golden_blocks() {
    let basis = basis();
    assert!(WIDTHS.iter().all(|width| basis.widths.contains(width)), "the basis covers all widths");
    let tables = |block: &Golden| StreamTables::new(&basis, block.rope().as_ref(), BLOCK_LEN).unwrap();
    let written: Vec<u8> = BLOCKS.iter().flat_map(|block| encode(block, &tables(block))).collect();
    if std::env::var_os("KVLATHE_BLESS").is_some() {
        std::fs::write(golden(), &written).unwrap();
    }
    let bytes = std::fs::read(golden()).unwrap();
    assert!(bytes == written, "the encoders give other bytes than the golden file holds");

    for (block, packed) in BLOCKS.iter().zip(bytes.chunks_exact(bytes.len() / BLOCKS.len())) {
        let (x, tables) = (block.tokens(), tables(block));
        let turn_forward = block.rope().map(|rope| rope.rotation(block.centre()));
        for isa in available_isas() {
            let (mut out, mut scratch) = (vec![0.0f32; BLOCK_LEN * HEAD_DIM], Scratch::default());
            tables.decode_block(isa, packed, turn_forward.as_ref(), &mut out, &mut scratch).unwrap();
            for (t, token) in out.chunks_exact(HEAD_DIM).enumerate() {
                let by_hand = decoded_by_hand(packed, &basis, block, t);
                let norm = by_hand.iter().map(|v| v * v).sum::<f64>().sqrt();
                for (&got, &wanted) in token.iter().zip(&by_hand) {
                    let off = (f64::from(got) - wanted).abs();
                    assert!(off <= 1e-6 * norm, "{} token {t}: {got} is not {wanted}", isa.name());
                }
            }
            let of_token = |t: usize| &out[t * HEAD_DIM..(t + 1) * HEAD_DIM];
            for t in (0..block.n_placeholders).chain([3]) {
                assert!(of_token(t).iter().all(|&v| v == 0.0), "token {t} is zero");
            }
            let outlier = 7 * HEAD_DIM + 2;
            assert!((out[outlier] / x[outlier] - 1.0).abs() < 0.2, "nothing clips: {}", out[outlier]);
        }
    }
}

#[test]
fn the_golden_basis_has_every_width() {
    let widths: Vec<usize> =
        StreamTables::new(&basis(), None, BLOCK_LEN).unwrap().widths().map(Width::bits).collect();
    assert_eq!(widths, [8, 8, 8, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 0, 0]);
}
