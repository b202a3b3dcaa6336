//! Packed blocks: any activations to bytes and back, and any bytes decoded, scored and summed. Every instruction set
//! gives the same bits, and errors are within what the sizes of the terms allow.

use kvlathe::codec::gain::{BlockGain, GUARD_SCALES, MAX_MAGNITUDE};
use kvlathe::codec::{
    CoefficientSums, DRIFT_STEP, Isa, Queries, Scratch, StreamTables, Tokens, Width, available_isas,
    reference, side_information_bytes,
};

use crate::source::{Source, Stream};

/// Blocks that are scored together.
const N_BLOCKS: usize = 2;
/// What 16-bit integers are scaled to, as the kernels do it.
const NORM: f64 = 32_700.0;
/// Largest sum of integer weights, as the kernels have it.
const LARGEST_SUM: f64 = 8.39e6;
/// Relative error of a sum of some tens of float32 terms, with room.
const FLOAT: f64 = 2e-5;

pub(crate) fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let Some(stream) = source.stream() else { return };
    let (d, n) = (stream.tables.head_dim(), stream.tables.block_len());
    let first = usize::from(source.any::<u16>()) as i64;
    let mut x = source.repeat(d * n, Source::activation);
    // The cache refuses such tokens, which `layer_cache` tries.
    x.iter_mut().filter(|v| v.is_nan() || v.abs() > MAX_MAGNITUDE).for_each(|v| *v = 0.0);
    check_coding(&stream, &x, first);

    let packed = source.repeat(N_BLOCKS * stream.tables.block_bytes(), Source::any::<u8>);
    let blocks: Vec<&[u8]> = packed.chunks_exact(stream.tables.block_bytes()).collect();
    let tokens = check_decoding(&stream, &blocks, first);
    let n_queries = 1 + source.below(3);
    let queries = source.repeat(n_queries * d, |s| s.small() * s.one_of(&[1.0, 1e-6, 1e4, 1e9]));
    check_scores(&stream, &blocks, first, &queries, &tokens);
    // Only values are summed, and values are not turned.
    if stream.rope.is_none() {
        let weights = source.repeat(n_queries * N_BLOCKS * n, |s| s.small().abs());
        check_sums(&stream.tables, &blocks, &weights, &tokens);
    }
}

/// What the reference decodes, `[block_len, head_dim]` in the block's frame.
fn token_major(tables: &StreamTables, packed: &[u8]) -> Vec<f32> {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let columns = reference::decode(tables, packed);
    (0..n * d).map(|at| columns[at % d * n + at / d]).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The results of all instruction sets, which must be the same to the bit.
fn on_all(what: &str, mut compute: impl FnMut(Isa) -> Vec<f32>) -> Vec<f32> {
    let mut isas = available_isas().into_iter();
    let first = compute(isas.next().expect("the portable one"));
    for isa in isas {
        assert_eq!(bits(&compute(isa)), bits(&first), "{what} on {}", isa.name());
    }
    first
}

fn check_coding(stream: &Stream, x: &[f32], first: i64) {
    let tables = &stream.tables;
    let (d, n) = (tables.head_dim(), tables.block_len());
    let back = stream.rope.as_ref().map(|rope| rope.rotation(-(first + n as i64 / 2)));
    let mut frame: Vec<f32> = (0..d * n).map(|at| x[at % n * d + at / n]).collect();
    if let Some(back) = &back {
        back.apply_component_major(&mut frame, n);
    }
    let packed = reference::encode(tables, &frame);
    for isa in available_isas() {
        let (mut given, mut scratch) = (vec![0; packed.len()], Scratch::default());
        let tokens = Tokens { data: x, token_stride: d };
        tables.encode_block(isa, tokens, back.as_ref(), &mut given, &mut scratch).expect("it fits");
        assert_eq!(given, packed, "bytes on {}", isa.name());
    }
    for t in 0..n {
        let token: Vec<f64> = (0..d).map(|j| f64::from(frame[j * n + t])).collect();
        check_token(tables, &token, &packed, t);
    }
}

/// Gain and error of one token, in the block's frame.
fn check_token(tables: &StreamTables, token: &[f64], packed: &[u8], t: usize) {
    let (d, n, n_coded) = (tables.head_dim(), tables.block_len(), tables.n_coded());
    let block = block_gain(packed);
    let (gain, scale) = block.unpack_side(packed[2 + t]);
    let (gain, scale) = (f64::from(gain), f64::from(scale));
    let size = (token.iter().map(|v| v * v).sum::<f64>() / d as f64).sqrt();
    // 2⁻⁶³ is the least gain there is.
    if size < 2e-19 {
        return;
    }
    let ratio = (gain / size).log2().abs();
    let spacing = f64::from(1 << block.spacing);
    assert!(ratio <= (0.5 * spacing + 0.5) / 32.0 + 1e-5, "a gain of {gain} for a size of {size}");

    // The smallest guard that clips nothing leaves half a step; what the encoder chose is no worse in sum.
    let (levels, drift) = (levels(tables, packed, t), drift(tables, packed));
    let (mut largest, mut terms) = (0.0f64, Vec::new());
    for (i, width) in tables.widths().take(n_coded).enumerate() {
        let row = &tables.analysis()[i * d..(i + 1) * d];
        let products = row.iter().zip(token).map(|(a, x)| f64::from(*a) * x / gain);
        let mean = f64::from(tables.coded_mean()[i * n + t]);
        let slack = FLOAT * (products.clone().map(f64::abs).sum::<f64>() + mean.abs() + drift[i].abs());
        let z = products.sum::<f64>() - mean - drift[i];
        largest = largest.max((z.abs() + slack) / width.half_levels() as f64);
        terms.push((f64::from(tables.step_cost()[i]), z - scale * levels[i], slack));
    }
    let Some(safe) = GUARD_SCALES.iter().find(|scale| f64::from(**scale) >= largest) else { return };
    let half = 0.5 * f64::from(*safe);
    let cost: f64 = terms.iter().map(|(cost, error, _)| cost * error * error).sum();
    let most: f64 = terms.iter().map(|(cost, _, slack)| cost * (half + 2.0 * slack).powi(2)).sum();
    // Costs below float32's normal numbers are all the same to the encoder, and so are those beyond it.
    let floor = n_coded as f64 * f64::from(f32::MIN_POSITIVE);
    assert!(cost <= 1.001 * most + floor || most > 1e38, "token {t}: a cost of {cost}, at most {most}");
}

fn block_gain(packed: &[u8]) -> BlockGain {
    BlockGain::unpack(u16::from_le_bytes([packed[0], packed[1]]))
}

/// The drift of all coefficients, in steps.
fn drift(tables: &StreamTables, packed: &[u8]) -> Vec<f64> {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let half = d.div_ceil(2);
    let bytes = &packed[2 + n..2 + n + half];
    let code = |i: usize| if i < half { bytes[i] & 15 } else { bytes[i - half] >> 4 };
    tables
        .widths()
        .enumerate()
        .map(|(i, width)| (f64::from(code(i)) - 8.0) * f64::from(DRIFT_STEP / width.step()))
        .collect()
}

/// Levels of one token's coefficients that have planes.
fn levels(tables: &StreamTables, packed: &[u8], t: usize) -> Vec<f64> {
    let n = tables.block_len();
    let mut plane = side_information_bytes(tables.head_dim(), n);
    // Bits of the token's code in a plane of `bits` that begins at `at`.
    let run = |bits: usize, at: usize| {
        let len = n * bits / 8;
        u32::from(packed[at + t % len]) >> (bits * (t / len)) & ((1 << bits) - 1)
    };
    let level = |width: Width| {
        let code = match width {
            Width::W3 => run(2, plane) | run(1, plane + n / 4) << 2,
            _ => run(width.bits(), plane),
        };
        plane += n * width.bits() / 8;
        f64::from(code) + 0.5 - width.half_levels() as f64
    };
    tables.widths().take(tables.n_coded()).map(level).collect()
}

/// All blocks decoded, turned forward: `[tokens, head_dim]`.
fn check_decoding(stream: &Stream, blocks: &[&[u8]], first: i64) -> Vec<f32> {
    let tables = &stream.tables;
    let (d, n) = (tables.head_dim(), tables.block_len());
    let mut all = Vec::new();
    for (b, block) in blocks.iter().enumerate() {
        let decode = |isa, forward: Option<&_>| {
            let (mut out, mut scratch) = (vec![0.0f32; d * n], Scratch::default());
            tables.decode_block(isa, block, forward, &mut out, &mut scratch).expect("it fits");
            out
        };
        let plain = on_all("values", |isa| decode(isa, None));
        assert_eq!(bits(&plain), bits(&token_major(tables, block)), "values of the reference");
        let centre = first + (b * n + n / 2) as i64;
        let forward = stream.rope.as_ref().map(|rope| rope.rotation(centre));
        all.extend(on_all("turned values", |isa| decode(isa, forward.as_ref())));
    }
    assert!(all.iter().all(|v| v.is_finite()), "any bytes are finite numbers");
    all
}

/// Length of each column of the synthesis times its largest level: how much a coefficient can bring.
fn column_sizes(tables: &StreamTables) -> Vec<(f64, f64)> {
    let d = tables.head_dim();
    let widths = tables.widths().enumerate();
    let norm = |i: usize| norm((0..d).map(|j| tables.synthesis()[j * d + i]));
    widths.map(|(i, width)| (norm(i), width.half_levels() as f64)).collect()
}

/// The most that drift can add to a shape.
fn drift_size(tables: &StreamTables) -> f64 {
    let columns = column_sizes(tables).into_iter().zip(tables.drift_units());
    columns.map(|((norm, _), unit)| 8.0 * norm * f64::from(*unit)).sum()
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// Gain and step factor of each token of some blocks.
fn sides(tables: &StreamTables, blocks: &[&[u8]]) -> Vec<(f64, f64)> {
    let sides = |block: &&[u8]| {
        let gain = block_gain(block);
        let (gains, scales): (Vec<f32>, Vec<f32>) =
            block[2..2 + tables.block_len()].iter().map(|&side| gain.unpack_side(side)).unzip();
        gains.into_iter().map(f64::from).zip(scales.into_iter().map(f64::from)).collect::<Vec<_>>()
    };
    blocks.iter().flat_map(sides).collect()
}

fn check_scores(stream: &Stream, blocks: &[&[u8]], first: i64, queries: &[f32], tokens: &[f32]) {
    let tables = &stream.tables;
    let (d, n) = (tables.head_dim(), tables.block_len());
    let scores = on_all("scores", |isa| {
        let (ready, mut scratch) = (Queries::new(tables, queries).expect("memory"), Scratch::default());
        let mut walk = stream.rope.as_ref().map(|rope| rope.walk_back(first + n as i64 / 2, n as i64));
        let mut scores = vec![0.0; queries.len() / d * blocks.len() * n];
        tables
            .score_blocks(isa, blocks, walk.as_mut(), &ready, blocks, &mut scores, &mut scratch)
            .expect("it fits");
        scores
    });
    let columns = column_sizes(tables);
    let terms: f64 = columns.iter().map(|(norm, level)| norm * level).sum();
    let longest = columns.iter().fold(0.0f64, |most, (norm, _)| most.max(*norm));
    let levels: f64 = columns.iter().map(|(_, level)| level).sum();
    let largest_projected = NORM.min(2.14e9 / (2.0 * levels).max(1.0));
    let mean = norm((0..d).map(|j| tables.shape_mean()[j * n + n / 2]));
    // Of the drift's part only the query's rounding counts, beside float32.
    let drift = drift_size(tables);
    let drift_rounded = drift * 2.0 * ((d as f64).sqrt() + 1.0) / NORM;
    for (query, scores) in queries.chunks_exact(d).zip(scores.chunks_exact(blocks.len() * n)) {
        let length = norm(query.iter().copied());
        let sides = sides(tables, blocks);
        for ((score, token), (gain, scale)) in scores.iter().zip(tokens.chunks_exact(d)).zip(sides) {
            let expected: f64 = query.iter().zip(token).map(|(q, x)| f64::from(*q) * f64::from(*x)).sum();
            // Query and column are rounded to integers, then their product; the rest is float32.
            let rounded = scale * terms * 2.0 * ((d as f64).sqrt() + 1.0) / NORM
                + scale * longest * levels * 1.1 / largest_projected;
            let most = gain
                * (length * (rounded + drift_rounded + FLOAT * (scale * terms + mean + drift))
                    + 1e-18 * (scale * terms + mean + drift));
            let error = (f64::from(*score) - expected).abs();
            let overflows = gain * length * (scale * terms + mean + drift) > 1e37;
            assert!(error <= most + 1e-30 || overflows, "a score of {score} for {expected}, within {most}");
        }
    }
}

fn check_sums(tables: &StreamTables, blocks: &[&[u8]], weights: &[f32], tokens: &[f32]) {
    let (d, n_tokens) = (tables.head_dim(), blocks.len() * tables.block_len());
    let n_queries = weights.len() / n_tokens;
    let sums = on_all("sums", |isa| {
        let (mut sums, mut scratch) = (CoefficientSums::new(tables, n_queries), Scratch::default());
        tables.accumulate_blocks(isa, blocks, weights, &mut sums, &mut scratch).expect("it fits");
        let mut out = vec![0.0; n_queries * d];
        tables.finish_sums(isa, &sums, &mut out, &mut scratch).expect("it fits");
        out
    });
    let terms: f64 = column_sizes(tables).iter().map(|(norm, level)| norm * level).sum();
    let mean = norm((0..d).map(|j| tables.shape_mean()[j * tables.block_len() + tables.block_len() / 2]));
    let (sides, drift) = (sides(tables, blocks), drift_size(tables));
    for (weights, sums) in weights.chunks_exact(n_tokens).zip(sums.chunks_exact(d)) {
        let weighted = || weights.iter().zip(&sides).map(|(w, (gain, scale))| f64::from(*w) * gain * scale);
        let (largest, total) = (weighted().fold(0.0, f64::max), weighted().sum::<f64>());
        let means: f64 =
            weights.iter().zip(&sides).map(|(w, (gain, _))| f64::from(*w) * gain * (mean + drift)).sum();
        // Weights are rounded to integers; the rest is float32.
        let unit = (largest / NORM).max(total / (LARGEST_SUM - 0.5 * n_tokens as f64));
        let most = terms * (0.51 * n_tokens as f64 * unit + FLOAT * total) + FLOAT * means;
        for (j, sum) in sums.iter().enumerate() {
            let values = tokens.chunks_exact(d).map(|token| f64::from(token[j]));
            let expected: f64 = weights.iter().zip(values).map(|(w, x)| f64::from(*w) * x).sum();
            let error = (f64::from(*sum) - expected).abs();
            assert!(error <= most + 1e-30, "a sum of {sum} for {expected}, within {most}");
        }
    }
}
