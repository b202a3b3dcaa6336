//! Attention's products with packed blocks, by instruction set and by the number of queries that share a KV head,
//! beside the limits of the machine measured in the same run: `cargo bench -p kvlathe-codec --bench attend`.
//!
//! *At peak* is the time that the multiply-adds alone would take at the peak rate of the same instruction set, as a
//! share of the time taken. GB/s counts packed bytes, read once.

mod three_bits;

use std::hint::black_box;
use std::time::Instant;

use kvlathe_codec::{
    CoefficientSums, Isa, Pairing, Queries, Rope, Scratch, StreamTables, Tokens, available_isas, weigh,
};
use three_bits::{BLOCK_LEN, HEAD_DIM, activations, basis};

const N_BLOCKS: usize = 16;
const N_TOKENS: usize = N_BLOCKS * BLOCK_LEN;
/// Bytes copied to find the bandwidth: far more than any cache holds.
const COPY_BYTES: usize = 256 << 20;

fn main() {
    // `cargo test --benches` passes --test: nothing to measure then.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!("copying {:.1} GB/s read and written, one thread", copy_bandwidth() / 1e9);
    println!(
        "             queries | ns a token: score  softmax      sum | packed GB/s | at peak (of G multiply-adds/s)"
    );
    // On x86-64 the portable build is the definition, not a contender: without FMA it is slower by two orders.
    let contends = |isa: &Isa| *isa != Isa::Portable || cfg!(target_arch = "aarch64");
    for isa in available_isas().into_iter().filter(contends) {
        let peak = Peak::of(isa);
        for n_queries in [1, 3, 7, 16] {
            let run = Run::new(isa, n_queries);
            let seconds = [run.score(), run.softmax(), run.accumulate()];
            let ns: Vec<f64> = seconds.iter().map(|s| s * 1e9 / N_TOKENS as f64).collect();
            let total: f64 = seconds.iter().sum();
            println!(
                "{:>12} {:>7} | {:>17.2} {:>8.2} {:>8.2} | {:>11.2} | {:>5.0} % ({:.0} float32, {:.0} int16)",
                isa.name(),
                n_queries,
                ns[0],
                ns[1],
                ns[2],
                run.packed_bytes() as f64 / total / 1e9,
                100.0 * run.seconds_at(&peak) / total,
                peak.float / 1e9,
                peak.int16 / 1e9,
            );
        }
    }
}

/// The best of several runs, in seconds a call: what the machine can do when nobody disturbs it.
fn fastest(mut call: impl FnMut()) -> f64 {
    let mut calls = 1;
    loop {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        if start.elapsed().as_secs_f64() > 0.01 {
            break;
        }
        calls *= 2;
    }
    (0..20)
        .map(|_| {
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            start.elapsed().as_secs_f64() / f64::from(calls)
        })
        .fold(f64::INFINITY, f64::min)
}

fn copy_bandwidth() -> f64 {
    let (from, mut to) = (vec![1u8; COPY_BYTES], vec![0u8; COPY_BYTES]);
    2.0 * COPY_BYTES as f64 / fastest(|| black_box(&mut to).copy_from_slice(black_box(&from)))
}

/// Multiply-adds a second of one thread that only multiplies and adds.
struct Peak {
    float: f64,
    int16: f64,
}

/// Twelve independent chains, so that the units never wait; `$lanes` multiply-adds an operation.
macro_rules! chains {
    ($name:ident, $arch:literal, $features:literal, $vector:ty, $one:expr, $lanes:literal, $op:expr) => {
        #[cfg(target_arch = $arch)]
        #[target_feature(enable = $features)]
        fn $name() -> f64 {
            const ROUNDS: usize = 2_000;
            const REPEATS: usize = 64;
            let one: $vector = black_box($one);
            let mut sums: [$vector; 12] = [black_box($one); 12];
            let start = Instant::now();
            for _ in 0..ROUNDS {
                for _ in 0..REPEATS {
                    for sum in &mut sums {
                        *sum = $op(*sum, one, one);
                    }
                }
                // Keeps the compiler from multiplying by the number of rounds instead.
                sums = black_box(sums);
            }
            ($lanes * 12 * REPEATS * ROUNDS) as f64 / start.elapsed().as_secs_f64()
        }
    };
}

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

chains!(float_256, "x86_64", "avx2,fma", __m256, _mm256_set1_ps(0.5), 8, |s, a, b| _mm256_fmadd_ps(a, b, s));
chains!(float_512, "x86_64", "avx512f", __m512, _mm512_set1_ps(0.5), 16, |s, a, b| _mm512_fmadd_ps(a, b, s));
chains!(int_256, "x86_64", "avx2", __m256i, _mm256_set1_epi16(3), 16, |s, _, b| _mm256_add_epi32(
    s,
    _mm256_madd_epi16(s, b)
));
chains!(int_512, "x86_64", "avx512f,avx512bw", __m512i, _mm512_set1_epi16(3), 32, |s, _, b| {
    _mm512_add_epi32(s, _mm512_madd_epi16(s, b))
});
chains!(int_vnni, "x86_64", "avx512f,avx512vnni", __m512i, _mm512_set1_epi16(3), 32, |s, a, b| {
    _mm512_dpwssd_epi32(s, a, b)
});
chains!(float_neon, "aarch64", "neon", float32x4_t, vdupq_n_f32(0.5), 4, |s, a, b| vfmaq_f32(s, a, b));
chains!(int_neon, "aarch64", "neon", int32x4_t, vdupq_n_s32(3), 4, |s, a, _| {
    let factor = vget_low_s16(vreinterpretq_s16_s32(a));
    vmlal_s16(s, factor, factor)
});

impl Peak {
    fn of(isa: Isa) -> Self {
        // SAFETY: `available_isas` gives only instruction sets that the machine has.
        let once = || unsafe {
            match isa.name() {
                #[cfg(target_arch = "x86_64")]
                "avx2" => Some((float_256(), int_256())),
                #[cfg(target_arch = "x86_64")]
                "avx512" => Some((float_512(), int_512())),
                #[cfg(target_arch = "x86_64")]
                "avx512vnni" => Some((float_512(), int_vnni())),
                #[cfg(target_arch = "aarch64")]
                "portable" | "neon" => Some((float_neon(), int_neon())),
                _ => None,
            }
        };
        let rounds: Vec<(f64, f64)> = (0..20).filter_map(|_| once()).collect();
        // NaN where nobody knows.
        let best = |values: Vec<f64>| values.into_iter().fold(f64::NAN, f64::max);
        let float = best(rounds.iter().map(|round| round.0).collect());
        Self { float, int16: best(rounds.iter().map(|round| round.1).collect()) }
    }
}

/// One KV head's blocks at about three bits a value, as the allocation gives it, and queries.
struct Run {
    isa: Isa,
    n_queries: usize,
    tables: StreamTables,
    rope: Rope,
    blocks: Vec<Vec<u8>>,
    queries: Queries,
}

impl Run {
    fn new(isa: Isa, n_queries: usize) -> Self {
        let inv_freq = (0..HEAD_DIM / 2).map(|i| 0.7f64.powi(i as i32)).collect();
        let rope = Rope::new(Pairing::HalfSplit, HEAD_DIM, inv_freq).expect("a valid rope");
        let tables = StreamTables::new(&basis(), Some(&rope), BLOCK_LEN).expect("a valid basis");
        let x = activations();
        let mut packed = vec![0; tables.block_bytes()];
        let tokens = Tokens { data: &x[..], token_stride: HEAD_DIM };
        tables
            .encode_block(isa, tokens, None, &mut packed, &mut Scratch::default())
            .expect("finite activations");
        let queries = Queries::new(&tables, &vec![0.3; n_queries * HEAD_DIM]).expect("memory for queries");
        Self { isa, n_queries, tables, rope, blocks: vec![packed; N_BLOCKS], queries }
    }

    fn slices(&self) -> Vec<&[u8]> {
        self.blocks.iter().map(Vec::as_slice).collect()
    }

    /// Keys and values.
    fn packed_bytes(&self) -> usize {
        2 * N_BLOCKS * self.tables.block_bytes()
    }

    /// Seconds that the multiply-adds would take at peak rate.
    fn seconds_at(&self, peak: &Peak) -> f64 {
        let n = self.n_queries as f64;
        // Queries to coefficients once a block, coefficients times codes, codes times weights.
        let int16 = n * (N_BLOCKS * HEAD_DIM * HEAD_DIM + 2 * N_TOKENS * self.tables.n_coded()) as f64;
        let float = n * (N_TOKENS * HEAD_DIM / 2) as f64;
        int16 / peak.int16 + float / peak.float
    }

    fn score(&self) -> f64 {
        let (blocks, mut scratch) = (self.slices(), Scratch::default());
        let mut scores = vec![0.0; self.n_queries * N_TOKENS];
        let walk = self.rope.walk_back(1000, BLOCK_LEN as i64);
        fastest(|| {
            let mut walk = walk.clone();
            self.tables
                .score_blocks(
                    self.isa,
                    &blocks,
                    Some(&mut walk),
                    &self.queries,
                    &[],
                    &mut scores,
                    &mut scratch,
                )
                .expect("shapes that fit");
        })
    }

    fn softmax(&self) -> f64 {
        let mut scores = vec![-0.1; self.n_queries * N_TOKENS];
        let [mut max, mut sum, mut rescale] = [(); 3].map(|()| vec![0.0; self.n_queries]);
        fastest(|| weigh(self.isa, &mut scores, N_TOKENS, &mut max, &mut sum, &mut rescale))
    }

    fn accumulate(&self) -> f64 {
        let (blocks, mut scratch) = (self.slices(), Scratch::default());
        let weights = vec![0.01; self.n_queries * N_TOKENS];
        let mut sums = CoefficientSums::new(&self.tables, self.n_queries);
        fastest(|| {
            self.tables
                .accumulate_blocks(self.isa, &blocks, &weights, &mut sums, &mut scratch)
                .expect("shapes that fit");
        })
    }
}
