//! Attention's products with packed blocks, against "decode, then multiply in f64".

use kvlathe_codec::{
    Basis, CoefficientSums, Isa, MAX_TOKENS_AT_ONCE, Pairing, Queries, Rope, Scratch, StreamTables, Tokens,
    Width, available_isas, reference,
};

fn wave(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed * 13) as f32 * 0.731).sin() * (1.0 + (i % 5) as f32)).collect()
}

/// `calibrated`: coefficients that suffer about equal distortion, as calibration gives them.
fn tables(
    d: usize,
    block_len: usize,
    rope: Option<&Rope>,
    widths: [Width; 6],
    calibrated: bool,
) -> StreamTables {
    // Nearly orthogonal columns, as calibration's are: else large terms cancel.
    let mut synthesis: Vec<f32> = wave(3, d * d).iter().map(|v| 0.1 * v).collect();
    (0..d).for_each(|i| synthesis[i * d + i] += 12.0);
    for (i, value) in synthesis.iter_mut().enumerate() {
        let width = widths[i % d % 6];
        if calibrated {
            *value *= 0.1 / width.step();
        }
    }
    let basis = Basis {
        mean: wave(4, d),
        synthesis,
        importance: vec![1.0; d],
        widths: (0..d).map(|i| widths[i % 6]).collect(),
    };
    StreamTables::new(&basis, rope, block_len).unwrap()
}

/// Consecutive packed blocks from position `first` on, and their decoded tokens `[tokens, d]`, turned forward again.
fn blocks(
    tables: &StreamTables,
    rope: Option<&Rope>,
    first: i64,
    n_blocks: usize,
    isa: Isa,
) -> (Vec<Vec<u8>>, Vec<f32>) {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let mut scratch = Scratch::default();
    let (mut all, mut decoded) = (Vec::new(), vec![0.0; n_blocks * n * d]);
    for (b, decoded) in decoded.chunks_exact_mut(n * d).enumerate() {
        let x = wave(8 + b, n * d);
        let centre = first + (b * n + n / 2) as i64;
        let mut packed = vec![0; tables.block_bytes()];
        let back = rope.map(|r| r.rotation(-centre));
        tables
            .encode_block(isa, Tokens { data: &x, token_stride: d }, back.as_ref(), &mut packed, &mut scratch)
            .unwrap();
        let frame = reference::decode(tables, &packed);
        for (t, token) in decoded.chunks_exact_mut(d).enumerate() {
            (0..d).for_each(|j| token[j] = frame[j * n + t]);
            if let Some(rope) = rope {
                rope.rotation(centre).apply(token);
            }
        }
        all.push(packed);
    }
    (all, decoded)
}

fn dot(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    a.zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

const ALL: [Width; 6] = [Width::W8, Width::W4, Width::W1, Width::W2, Width::W3, Width::W0];
const NONE: [Width; 6] = [Width::W0; 6];
const N_BLOCKS: usize = 3;

#[test]
fn scores_are_those_of_the_decoded_keys() {
    for (d, n, n_queries, widths, calibrated) in [
        (64, 32, 7, ALL, true),
        (80, 16, 1, ALL, true),
        (128, 64, 16, ALL, true),
        (96, 8, 3, ALL, true),
        (20, 16, 5, ALL, true),
        (64, 32, 2, NONE, true),
        (72, 32, 9, ALL, false),
        (20, 128, 3, ALL, true),
        (36, 256, 1, ALL, true),
    ] {
        for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
            let rope =
                Rope::new(pairing, d / 2, (0..d / 4).map(|i| 0.7f64.powi(i as i32)).collect()).unwrap();
            let tables = tables(d, n, Some(&rope), widths, calibrated);
            let first = 5000;
            let wide = wave(21, n_queries * d);
            let mut bits: Option<Vec<u32>> = None;
            for isa in available_isas() {
                let (packed, decoded) = blocks(&tables, Some(&rope), first, N_BLOCKS, isa);
                let packed: Vec<&[u8]> = packed.iter().map(Vec::as_slice).collect();
                let (queries, mut scratch) = (Queries::new(&tables, &wide).unwrap(), Scratch::default());
                let mut scores = vec![0.0; n_queries * N_BLOCKS * n];
                let mut walk = rope.walk_back(first + n as i64 / 2, n as i64);
                tables
                    .score_blocks(isa, &packed, Some(&mut walk), &queries, &[], &mut scores, &mut scratch)
                    .unwrap();
                for (q, query) in wide.chunks_exact(d).enumerate() {
                    for (t, token) in decoded.chunks_exact(d).enumerate() {
                        let expected =
                            dot(query.iter().map(|v| f64::from(*v)), token.iter().map(|v| f64::from(*v)));
                        let given = f64::from(scores[q * N_BLOCKS * n + t]);
                        let bound = if calibrated { 1e-4 } else { 1e-3 } * norm(query) * norm(token);
                        assert!(
                            (given - expected).abs() <= bound,
                            "{} d={d}: {given} for {expected}, bound {bound}",
                            isa.name()
                        );
                    }
                }
                let ours: Vec<u32> = scores.iter().map(|v| v.to_bits()).collect();
                assert_eq!(*bits.get_or_insert(ours.clone()), ours, "{} differs in bits", isa.name());
            }
        }
    }
}

#[test]
fn sums_are_those_of_the_decoded_values() {
    for (d, n, n_queries, widths) in [
        (64, 64, 7, ALL),
        (80, 16, 1, ALL),
        (256, 32, 2, ALL),
        (64, 8, 3, NONE),
        (72, 8, 5, ALL),
        (24, 256, 4, ALL),
    ] {
        let tables = tables(d, n, None, widths, false);
        let n_tokens = N_BLOCKS * n;
        let weights: Vec<f32> = wave(5, n_queries * n_tokens).iter().map(|w| w.abs()).collect();
        let mut bits: Option<Vec<u32>> = None;
        for isa in available_isas() {
            let (packed, decoded) = blocks(&tables, None, 0, N_BLOCKS, isa);
            let packed: Vec<&[u8]> = packed.iter().map(Vec::as_slice).collect();
            let mut sums = CoefficientSums::new(&tables, n_queries);
            let mut scratch = Scratch::default();
            // More blocks than there will be: nothing of them may stay.
            let more = [&packed[..], &packed[..1]].concat();
            let heavy = vec![1.0; n_queries * more.len() * n];
            tables
                .accumulate_blocks(
                    isa,
                    &more,
                    &heavy,
                    &mut CoefficientSums::new(&tables, n_queries),
                    &mut scratch,
                )
                .unwrap();
            // Twice, the first half as heavy after a rescaling; then all of it once more: three halves, doubled.
            tables.accumulate_blocks(isa, &packed, &weights, &mut sums, &mut scratch).unwrap();
            (0..n_queries).for_each(|q| sums.scale(q, 0.5));
            tables.accumulate_blocks(isa, &packed, &weights, &mut sums, &mut scratch).unwrap();
            let once = sums.clone();
            (0..n_queries).for_each(|q| sums.add(q, &once, 1.0));
            let mut out = vec![0.0; n_queries * d];
            tables.finish_sums(isa, &sums, &mut out, &mut scratch).unwrap();
            for q in 0..n_queries {
                let weights = &weights[q * n_tokens..(q + 1) * n_tokens];
                let size: f64 = weights
                    .iter()
                    .zip(decoded.chunks_exact(d))
                    .map(|(w, token)| 3.0 * f64::from(*w) * norm(token))
                    .sum();
                for j in 0..d {
                    let expected = dot(
                        weights.iter().map(|w| 3.0 * f64::from(*w)),
                        decoded.chunks_exact(d).map(|token| f64::from(token[j])),
                    );
                    let given = f64::from(out[q * d + j]);
                    assert!(
                        (given - expected).abs() <= 2e-5 * size,
                        "{} d={d}: {given} for {expected}, size {size}",
                        isa.name()
                    );
                }
            }
            let ours: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
            assert_eq!(*bits.get_or_insert(ours.clone()), ours, "{} differs in bits", isa.name());
        }
    }
}

/// Weights that would overflow 32-bit sums if they were rounded against the largest only.
#[test]
fn even_weights_over_many_tokens_do_not_overflow() {
    let tables = tables(16, 32, None, [Width::W8; 6], false);
    let n_tokens = MAX_TOKENS_AT_ONCE;
    for isa in available_isas() {
        let (packed, decoded) = blocks(&tables, None, 0, 1, isa);
        let many: Vec<&[u8]> = vec![&packed[0]; n_tokens / 32];
        let weights = vec![1.0; n_tokens];
        let (mut sums, mut scratch) = (CoefficientSums::new(&tables, 1), Scratch::default());
        tables.accumulate_blocks(isa, &many, &weights, &mut sums, &mut scratch).unwrap();
        let mut out = vec![0.0; 16];
        tables.finish_sums(isa, &sums, &mut out, &mut scratch).unwrap();
        for j in 0..16 {
            let expected: f64 =
                (n_tokens / 32) as f64 * decoded.chunks_exact(16).map(|x| f64::from(x[j])).sum::<f64>();
            assert!((f64::from(out[j]) - expected).abs() <= 1e-4 * n_tokens as f64 * 3.0, "{}", isa.name());
        }
    }
}
