//! A stream at about three bits a value, as the allocation gives it, and activations for it.

use kvlathe_codec::{Basis, Width};

pub const HEAD_DIM: usize = 64;
pub const BLOCK_LEN: usize = 64;

pub fn basis() -> Basis {
    let mut synthesis = vec![0.0; HEAD_DIM * HEAD_DIM];
    for i in 0..HEAD_DIM {
        for j in 0..HEAD_DIM {
            synthesis[i * HEAD_DIM + j] = ((i * 31 + j * 17) as f32).sin() + if i == j { 8.0 } else { 0.0 };
        }
    }
    let widths = (0..HEAD_DIM)
        .map(|i| match i {
            0..2 => Width::W8,
            2..26 => Width::W4,
            26..42 => Width::W3,
            42..54 => Width::W2,
            54..62 => Width::W1,
            _ => Width::W0,
        })
        .collect();
    Basis { mean: vec![0.1; HEAD_DIM], synthesis, importance: vec![1.0; HEAD_DIM], widths }
}

/// One block, `[BLOCK_LEN, HEAD_DIM]`.
pub fn activations() -> Vec<f32> {
    (0..BLOCK_LEN * HEAD_DIM).map(|i| (i as f32 * 0.37).sin() * 3.0).collect()
}
