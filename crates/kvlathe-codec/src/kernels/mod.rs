//! Fast encode and decode: one body, compiled for each instruction set, chosen at run time in one place.
//!
//! The bodies put the tokens of a block side by side in vectors and keep the reference's order of operations for each
//! token, so every instruction set gives the reference's bytes.

mod accumulate;
mod body;
mod codes;
#[cfg(target_arch = "x86_64")]
mod codes_x86;
mod floats;
#[cfg(target_arch = "aarch64")]
mod floats_neon;
#[cfg(target_arch = "x86_64")]
mod floats_x86;
mod frame;
mod isa;
mod lanes;
mod multiply;
mod multiply_codes;
#[cfg(target_arch = "aarch64")]
mod multiply_codes_neon;
#[cfg(target_arch = "x86_64")]
mod multiply_codes_x86;
#[cfg(target_arch = "aarch64")]
mod multiply_neon;
#[cfg(target_arch = "x86_64")]
mod multiply_x86;
mod product;
mod score;
mod side;
mod softmax;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tiles;

pub(crate) use lanes::{LANES, WIDE, total};

pub use isa::{Isa, available_isas, best_isa};
pub use softmax::shrinkage;

use half::bf16;

use crate::attend::CoefficientSums;
use crate::basis::StreamTables;
use crate::error::Result;
use crate::lines::Lines;
use crate::query::Queries;
use crate::rope::{Rotation, RotationWalk};

/// Buffers that coding and attention reuse from block to block.
#[derive(Debug, Default, Clone)]
pub struct Scratch {
    /// `[head_dim, block_len]` vectors, component-major.
    pub(crate) x: Lines<f32>,
    /// `[head_dim, block_len]` coefficients in steps.
    pub(crate) z: Lines<f32>,
    /// One row of codes, or those of the drift.
    pub(crate) codes: Lines<u8>,
    /// `[block_len]`.
    pub(crate) gain_codes: Lines<u16>,
    /// `[n_blocks, n_padded]` drift in steps.
    pub(crate) drift: Lines<f32>,
    /// `[n_queries, n_places]` queries in the block's frame, rounded.
    pub(crate) turned: Lines<i16>,
    /// `[n_queries, n_pairs]` the queries' products with the mean in the block's frame.
    pub(crate) even: Lines<f32>,
    pub(crate) odd: Lines<f32>,
    /// Integer products, before they become something else.
    pub(crate) products: Lines<i32>,
    /// `[n_queries, n_padded]`: queries times the synthesis; the same rounded, in the order of
    /// [`multiply_codes::MultiplyCodes::order_columns`].
    pub(crate) coefficients: Lines<f32>,
    pub(crate) projected: Lines<i16>,
    /// `[n_queries, n_blocks]`, then `[n_queries, n_padded]`: weights of blocks, and what their drift adds to sums.
    pub(crate) block_weights: Lines<f32>,
    pub(crate) drift_sums: Lines<f32>,
    /// `[⌈n_coded/4⌉, block_len, 4]` codes of a block.
    pub(crate) quads: Lines<u8>,
    /// `[n_queries, block_len]` queries times the mean table.
    pub(crate) mean_scores: Lines<f32>,
    /// `[2, n_queries, width]`: even and odd parts of those scores.
    pub(crate) mean_parts: Lines<f32>,
    /// Gains and step factors of tokens.
    pub(crate) gains: Lines<f32>,
    pub(crate) scales: Lines<f32>,
    /// `[n_queries, tokens]`, tokens padded to [`multiply_codes::DOT_STEP`]: attention weights times gains and step factors,
    /// rounded.
    pub(crate) weights_i16: Lines<i16>,
    /// `[n_queries]`: what the unit of rounded numbers is worth, and what is added to a product with codes to make it one
    /// with levels.
    pub(crate) units: Lines<f32>,
    pub(crate) offsets: Lines<f32>,
    /// `[n_queries]`: sums of `weights_i16`.
    pub(crate) totals: Lines<i32>,
    /// `[⌈n_coded/4⌉, n_queries, 4]`: products of `weights_i16` with codes.
    pub(crate) level_dots: Lines<i32>,
    /// Codes of a few coefficients over many tokens.
    pub(crate) row_codes: Lines<u8>,
    /// `[n_queries, n_padded]`: vectors of sums of coefficients, but for the mean.
    pub(crate) vectors: Lines<f32>,
}

/// Adding 1.5·2²³ rounds a value below 2²² to an integer and leaves it in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// Sets a buffer's length; what it held before may stay.
fn fit<T: bytemuck::Pod>(buffer: &mut Lines<T>, len: usize) -> Result<()> {
    buffer.resize(len, "the codec's buffers")
}

impl Scratch {
    /// Sizes the buffers for coding a stream.
    pub(crate) fn fit(&mut self, tables: &StreamTables) -> Result<()> {
        let (d, n) = (tables.head_dim, tables.block_len);
        fit(&mut self.x, d * n)?;
        fit(&mut self.z, d * n)?;
        fit(&mut self.codes, d.max(n))?;
        fit(&mut self.gain_codes, n)?;
        fit(&mut self.drift, tables.n_padded())?;
        fit(&mut self.row_codes, n)?;
        fit(&mut self.gains, n)?;
        fit(&mut self.scales, n)
    }

    /// Sizes the buffers for scoring.
    pub(crate) fn fit_scores(&mut self, tables: &StreamTables, n_queries: usize) -> Result<()> {
        let (n, n_padded) = (tables.block_len, tables.n_padded());
        let query_tables = tables.query_tables();
        fit(&mut self.turned, n_queries * query_tables.n_places())?;
        fit(&mut self.even, n_queries * query_tables.mean.n_pairs)?;
        fit(&mut self.odd, n_queries * query_tables.mean.n_pairs)?;
        fit(&mut self.products, n_queries * n.max(n_padded))?;
        fit(&mut self.coefficients, n_queries * n_padded)?;
        fit(&mut self.projected, n_queries * n_padded)?;
        fit(&mut self.drift, n_padded)?;
        fit(&mut self.units, n_queries)?;
        fit(&mut self.offsets, n_queries)?;
        fit(&mut self.quads, tables.n_coded().next_multiple_of(codes::QUAD) * n)?;
        fit(&mut self.mean_scores, n_queries * n)?;
        fit(&mut self.mean_parts, 2 * n_queries * query_tables.mean.width)?;
        fit(&mut self.gains, n)?;
        fit(&mut self.scales, n)
    }

    /// Sizes the buffer for turning sums into vectors.
    pub(crate) fn fit_vectors(&mut self, tables: &StreamTables, n_queries: usize) -> Result<()> {
        fit(&mut self.vectors, n_queries * tables.n_padded())
    }

    /// Sizes the buffers for accumulating.
    pub(crate) fn fit_sums(
        &mut self,
        tables: &StreamTables,
        n_queries: usize,
        n_blocks: usize,
    ) -> Result<()> {
        let (n_tokens, n_padded) = (n_blocks * tables.block_len, tables.n_padded());
        let stride = n_tokens.next_multiple_of(multiply_codes::DOT_STEP);
        fit(&mut self.weights_i16, n_queries * stride)?;
        fit(&mut self.units, n_queries)?;
        fit(&mut self.totals, n_queries)?;
        fit(&mut self.level_dots, n_queries * tables.n_coded())?;
        fit(&mut self.row_codes, accumulate::TOGETHER * stride)?;
        fit(&mut self.drift, n_blocks * n_padded)?;
        fit(&mut self.block_weights, n_queries * n_blocks)?;
        fit(&mut self.drift_sums, n_queries * n_padded)?;
        fit(&mut self.gains, n_tokens)?;
        fit(&mut self.scales, n_tokens)
    }
}

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
                    $module::$body::<multiply_x86::Avx2>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    $module::$body::<multiply_x86::Avx512>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
                fn avx512_vnni($($arg: $ty),*) {
                    $module::$body::<multiply_x86::Avx512Vnni>($($arg),*);
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
                    $module::$body::<multiply_neon::Neon>($($arg),*);
                }
                match isa {
                    // SAFETY: an `Isa` other than `Portable` is only made after the CPU reported its features.
                    Isa::Neon => return unsafe { neon($($arg),*) },
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
    /// Scores queries against packed blocks.
    score, score::score, (
        tables: &StreamTables,
        blocks: &[&[u8]],
        walk: Option<&mut RotationWalk>,
        queries: &Queries,
        upcoming: &[&[u8]],
        scores: &mut [f32],
        scratch: &mut Scratch
    )
);
for_each_isa!(
    /// Adds packed blocks' weighted levels to sums.
    accumulate, accumulate::accumulate, (
        tables: &StreamTables,
        blocks: &[&[u8]],
        weights: &[f32],
        sums: &mut CoefficientSums,
        scratch: &mut Scratch
    )
);
for_each_isa!(
    /// Turns sums of coefficients into vectors.
    finish, accumulate::finish, (
        tables: &StreamTables,
        sums: &CoefficientSums,
        out: &mut [f32],
        scratch: &mut Scratch
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
    widen_bf16, product::widen_bf16, (from: &[bf16], to: &mut [f32])
);
for_each_isa!(
    /// Turns scores `[n_queries, n]` into weights e^(score − max), keeping each query's running maximum and sum;
    /// `rescale[q]` receives the factor for what was summed before.
    weigh, softmax::weigh, (scores: &mut [f32], n: usize, max: &mut [f32], sum: &mut [f32], rescale: &mut [f32])
);
