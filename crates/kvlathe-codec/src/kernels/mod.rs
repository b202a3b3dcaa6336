//! Fast encode and decode: one body, compiled for each instruction set, chosen at run time in one place.
//!
//! The bodies put the tokens of a block side by side in vectors and keep the reference's order of operations for each
//! token, so every instruction set gives the reference's bytes.

mod attend;
mod body;
mod isa;
mod multiply;
#[cfg(target_arch = "x86_64")]
mod multiply_x86;
mod product;
mod softmax;

pub use isa::{Isa, available_isas, best_isa};

use crate::attend::CoefficientSums;
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
    /// `[n_queries, head_dim]` queries in the block's frame.
    pub(crate) queries: Vec<f32>,
    /// `[n_queries, n_padded]` queries times the synthesis.
    pub(crate) projected: Vec<f32>,
    /// `[n_queries, block_len]` queries times the mean table.
    pub(crate) mean_scores: Vec<f32>,
}

/// Tokens that kernels work on together: every block length is a multiple, and eight f32 fill an AVX2 register.
pub(crate) const LANES: usize = 8;

impl Scratch {
    /// Sizes the buffers for a stream.
    pub(crate) fn fit(&mut self, tables: &StreamTables) {
        self.x.resize(tables.head_dim * tables.block_len, 0.0);
        self.z.resize(tables.n_padded() * tables.block_len, 0.0);
        self.codes.resize(tables.block_len, 0);
    }

    /// Sizes the buffers for queries of a stream.
    pub(crate) fn fit_queries(&mut self, tables: &StreamTables, n_queries: usize) {
        self.queries.resize(n_queries * tables.head_dim, 0.0);
        self.projected.resize(n_queries * tables.n_padded(), 0.0);
        self.mean_scores.resize(n_queries * tables.block_len, 0.0);
    }
}

/// Defines the public entry of a kernel: a `match` over instruction sets and one compiled copy of the body for each.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident, $module:ident::$body:ident, ($($arg:ident: $ty:ty),*)) => {
        $(#[$doc])*
        pub fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) {
                    $module::$body::<multiply_x86::Avx2>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    $module::$body::<multiply_x86::Avx512>($($arg),*);
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
            $module::$body::<multiply::Portable>($($arg),*);
        }
    };
}

for_each_isa!(
    /// Turns component-major vectors by one rotation.
    rotate, body::rotate, (rotation: &Rotation, x: &mut [f32], n_tokens: usize)
);
for_each_isa!(
    /// Encodes the frame vectors in `scratch.x` into `packed`.
    encode, body::encode, (tables: &StreamTables, scratch: &mut Scratch, packed: &mut [u8])
);
for_each_isa!(
    /// Decodes `packed` to frame vectors in `scratch.x`.
    decode, body::decode, (tables: &StreamTables, packed: &[u8], scratch: &mut Scratch)
);
for_each_isa!(
    /// Scores queries against a packed block.
    score, attend::score, (
        tables: &StreamTables,
        packed: &[u8],
        turn_back: Option<&Rotation>,
        queries: &[f32],
        scores: &mut [f32],
        scratch: &mut Scratch
    )
);
for_each_isa!(
    /// Adds a packed block's weighted levels to sums.
    accumulate, attend::accumulate, (
        tables: &StreamTables,
        packed: &[u8],
        weights: &[f32],
        sums: &mut CoefficientSums,
        scratch: &mut Scratch
    )
);
for_each_isa!(
    /// out[m, n] = a[m, k] · x[k, n], all row-major f32; `shape` is (k, n), n a multiple of eight.
    product, product::product, (a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize))
);
for_each_isa!(
    /// Turns scores `[n_queries, n]` into weights e^(score − max), keeping each query's running maximum and sum;
    /// `rescale[q]` receives the factor for what was summed before.
    weigh, softmax::weigh, (scores: &mut [f32], n: usize, max: &mut [f32], sum: &mut [f32], rescale: &mut [f32])
);
