//! Attention's products with packed blocks, against "decode, then multiply in f64".

use kvlathe_codec::{
    Basis, CoefficientSums, Isa, Pairing, Rope, Scratch, StreamTables, Tokens, Width, available_isas,
    reference,
};

fn wave(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 + seed * 13) as f32 * 0.731).sin() * (1.0 + (i % 5) as f32)).collect()
}

fn tables(d: usize, block_len: usize, rope: Option<&Rope>, widths: [Width; 4]) -> StreamTables {
    let mut synthesis = wave(3, d * d);
    (0..d).for_each(|i| synthesis[i * d + i] += 12.0);
    let basis = Basis {
        mean: wave(4, d),
        synthesis,
        importance: vec![1.0; d],
        widths: (0..d).map(|i| widths[i % 4]).collect(),
    };
    StreamTables::new(&basis, rope, block_len).unwrap()
}

/// A packed block and its decoded tokens `[block_len, d]`, turned forward again.
fn block(tables: &StreamTables, rope: Option<&Rope>, centre: i64, isa: Isa) -> (Vec<u8>, Vec<f32>) {
    let (d, n) = (tables.head_dim(), tables.block_len());
    let x = wave(8, n * d);
    let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
    let back = rope.map(|r| r.rotation(-centre));
    tables
        .encode_block(isa, Tokens { data: &x, token_stride: d }, back.as_ref(), &mut packed, &mut scratch)
        .unwrap();
    let frame = reference::decode(tables, &packed);
    let mut decoded = vec![0.0; n * d];
    for (t, token) in decoded.chunks_exact_mut(d).enumerate() {
        (0..d).for_each(|j| token[j] = frame[j * n + t]);
        if let Some(rope) = rope {
            rope.rotation(centre).apply(token);
        }
    }
    (packed, decoded)
}

const ALL: [Width; 4] = [Width::W8, Width::W4, Width::W2, Width::W0];
const NONE: [Width; 4] = [Width::W0; 4];

#[test]
fn scores_are_those_of_the_decoded_keys() {
    for (d, n, n_queries, widths) in
        [(64, 32, 7, ALL), (80, 16, 1, ALL), (128, 64, 16, ALL), (96, 8, 3, ALL), (64, 32, 2, NONE)]
    {
        for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
            let rope =
                Rope::new(pairing, d / 2, (0..d / 4).map(|i| 0.7f64.powi(i as i32)).collect()).unwrap();
            let tables = tables(d, n, Some(&rope), widths);
            let centre = 5000;
            let queries = wave(21, n_queries * d);
            for isa in available_isas() {
                let (packed, decoded) = block(&tables, Some(&rope), centre, isa);
                let mut scores = vec![0.0; n_queries * n];
                let back = rope.rotation(-centre);
                let mut scratch = Scratch::default();
                tables.score_block(isa, &packed, Some(&back), &queries, &mut scores, &mut scratch).unwrap();
                for q in 0..n_queries {
                    for t in 0..n {
                        let products =
                            (0..d).map(|j| f64::from(queries[q * d + j]) * f64::from(decoded[t * d + j]));
                        let (sum, size) =
                            products.fold((0.0, 0.0), |(s, a): (f64, f64), p| (s + p, a + p.abs()));
                        let error = (f64::from(scores[q * n + t]) - sum).abs();
                        assert!(
                            error <= 2e-5 * size + 1e-6,
                            "{} d={d}: {} for {sum}",
                            isa.name(),
                            scores[q * n + t]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn sums_are_those_of_the_decoded_values() {
    for (d, n, n_queries, widths) in [(64, 32, 7, ALL), (80, 16, 1, ALL), (256, 32, 2, ALL), (64, 8, 3, NONE)]
    {
        let tables = tables(d, n, None, widths);
        for isa in available_isas() {
            let (packed, decoded) = block(&tables, None, 0, isa);
            let weights: Vec<f32> = wave(5, n_queries * n).iter().map(|w| w.abs()).collect();
            let mut sums = CoefficientSums::new(&tables, n_queries);
            let mut scratch = Scratch::default();
            // Twice, the first half as heavy after a rescaling: three halves in all.
            tables.accumulate_block(isa, &packed, &weights, &mut sums, &mut scratch).unwrap();
            (0..n_queries).for_each(|q| sums.scale(q, 0.5));
            tables.accumulate_block(isa, &packed, &weights, &mut sums, &mut scratch).unwrap();
            let mut out = vec![0.0; n_queries * d];
            tables.finish_sums(&sums, &mut out).unwrap();
            for q in 0..n_queries {
                for j in 0..d {
                    let products =
                        (0..n).map(|t| 1.5 * f64::from(weights[q * n + t]) * f64::from(decoded[t * d + j]));
                    let (sum, size) = products.fold((0.0, 0.0), |(s, a): (f64, f64), p| (s + p, a + p.abs()));
                    let error = (f64::from(out[q * d + j]) - sum).abs();
                    assert!(
                        error <= 5e-5 * size + 1e-5,
                        "{} d={d}: {} for {sum}",
                        isa.name(),
                        out[q * d + j]
                    );
                }
            }
        }
    }
}
