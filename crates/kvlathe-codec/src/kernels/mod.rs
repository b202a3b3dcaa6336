//! Fast encode and decode: one body, compiled for each instruction set, chosen at run time in one place.
//!
//! The bodies put the tokens of a block side by side in vectors and keep the reference's order of operations for each
//! token, so every instruction set gives the reference's bytes.

mod body;
mod isa;
mod multiply;
#[cfg(target_arch = "x86_64")]
mod multiply_x86;

pub use isa::{Isa, available_isas, best_isa};

use crate::basis::StreamTables;
use crate::rope::Rotation;

/// Buffers that encoding and decoding reuse from block to block.
#[derive(Debug, Default, Clone)]
pub struct Scratch {
    /// `[head_dim, block_len]` vectors, component-major.
    pub(crate) x: Vec<f32>,
    /// `[n_coded, block_len]` coefficients in steps.
    pub(crate) z: Vec<f32>,
    /// One row of codes.
    pub(crate) codes: Vec<u8>,
}

impl Scratch {
    /// Sizes the buffers for a stream.
    pub(crate) fn fit(&mut self, tables: &StreamTables) {
        self.x.resize(tables.head_dim * tables.block_len, 0.0);
        self.z.resize(tables.n_coded() * tables.block_len, 0.0);
        self.codes.resize(tables.block_len, 0);
    }
}

/// Defines the public entry of a kernel: a `match` over instruction sets and one compiled copy of the body for each.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident, $body:ident, ($($arg:ident: $ty:ty),*)) => {
        $(#[$doc])*
        pub(crate) fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) {
                    body::$body::<multiply_x86::Avx2>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    body::$body::<multiply_x86::Avx512>($($arg),*);
                }
                match isa {
                    // SAFETY: an `Isa` other than `Portable` is only made after the CPU reported its features.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            body::$body::<multiply::Portable>($($arg),*);
        }
    };
}

for_each_isa!(
    /// Turns component-major vectors by one rotation.
    rotate, rotate, (rotation: &Rotation, x: &mut [f32], n_tokens: usize)
);
for_each_isa!(
    /// Encodes the frame vectors in `scratch.x` into `packed`.
    encode, encode, (tables: &StreamTables, scratch: &mut Scratch, packed: &mut [u8])
);
for_each_isa!(
    /// Decodes `packed` to frame vectors in `scratch.x`.
    decode, decode, (tables: &StreamTables, packed: &[u8], scratch: &mut Scratch)
);
