//! The one place that chooses an instruction set at run time: each kernel is compiled once for each of them.

use half::bf16;

use crate::kernels::accumulate::SummingBuffers;
use crate::kernels::coding_buffers::CodingBuffers;
use crate::kernels::score::ScoringBuffers;
use crate::kernels::{accumulate, decode, encode, frame, product, score, softmax, widen};
use crate::simd::isa::*;
use crate::transform::queries::Queries;
use crate::transform::rope::{Rotation, RotationWalk};
use crate::transform::sums::CoefficientSums;
use crate::transform::tables::StreamTables;

/// Defines the public entry of a kernel: a `match` over instruction sets and one compiled copy of the body for each.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident, $module:ident::$body:ident, ($($arg:ident: $ty:ty),*)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "one call does the work of several")]
        pub fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) {
                    $module::$body::<Avx2>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    $module::$body::<Avx512>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
                fn avx512_vnni($($arg: $ty),*) {
                    $module::$body::<Avx512Vnni>($($arg),*);
                }
                match isa {
                    // SAFETY: an `Isa` other than `Portable` is only made after the CPU reported its features.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx512Vnni => return unsafe { avx512_vnni($($arg),*) },
                    Isa::Portable => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            {
                #[target_feature(enable = "neon")]
                fn neon($($arg: $ty),*) {
                    $module::$body::<Neon>($($arg),*);
                }
                match isa {
                    // SAFETY: an `Isa` other than `Portable` is only made after the CPU reported its features.
                    Isa::Neon => return unsafe { neon($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $module::$body::<Portable>($($arg),*);
        }
    };
}

for_each_isa!(
    /// Turns component-major vectors by one rotation.
    rotate, frame::rotate, (rotation: &Rotation, x: &mut [f32], n_tokens: usize)
);
for_each_isa!(
    /// Encodes the frame vectors in `buffers.x` into `packed`.
    encode, encode::encode, (tables: &StreamTables, buffers: &mut CodingBuffers, packed: &mut [u8])
);
for_each_isa!(
    /// Decodes `packed` to frame vectors in `buffers.x`.
    decode, decode::decode, (tables: &StreamTables, packed: &[u8], buffers: &mut CodingBuffers)
);
for_each_isa!(
    /// Scores queries against packed blocks.
    score, score::score, (
        tables: &StreamTables,
        blocks: &[&[u8]],
        walk: Option<&mut RotationWalk>,
        queries: &Queries,
        upcoming: &[&[u8]],
        scores: &mut [f32],
        buffers: &mut ScoringBuffers
    )
);
for_each_isa!(
    /// Adds packed blocks' weighted levels to sums.
    accumulate, accumulate::accumulate, (
        tables: &StreamTables,
        blocks: &[&[u8]],
        weights: &[f32],
        sums: &mut CoefficientSums,
        buffers: &mut SummingBuffers
    )
);
for_each_isa!(
    /// Turns sums of coefficients into vectors.
    finish, accumulate::finish, (
        tables: &StreamTables,
        sums: &CoefficientSums,
        out: &mut [f32],
        buffers: &mut SummingBuffers
    )
);
for_each_isa!(
    /// out[m, n] = a[m, k] · x[k, n], all row-major f32; `shape` is (k, n), n a multiple of eight.
    product, product::product, (a: &[f32], x: &[f32], out: &mut [f32], shape: (usize, usize))
);
for_each_isa!(
    /// out[m, n] = a[m, k] · b[n, k]ᵀ, dot products of rows; `shape` is (k, n), k a multiple of eight.
    row_products, product::row_products, (a: &[f32], b: &[f32], out: &mut [f32], shape: (usize, usize))
);
for_each_isa!(
    /// Widens numbers in bfloat16, exactly; as many of `from` as of `to`.
    widen_bf16, widen::widen_bf16, (from: &[bf16], to: &mut [f32])
);
for_each_isa!(
    /// Turns scores `[n_queries, n]` into weights e^(score − max), keeping each query's running maximum and sum;
    /// `rescale[q]` receives the factor for what was summed before.
    weigh, softmax::weigh, (scores: &mut [f32], n: usize, max: &mut [f32], sum: &mut [f32], rescale: &mut [f32])
);
