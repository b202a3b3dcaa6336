//! Designs against formulas: decorrelation, unit variance, what a better metric buys.

use std::sync::Arc;

use kvlathe_calib::{
    CalibratedLayer, DesignOptions, Metric, ModelMoments, ModelShape, Side, StreamMoments, TurnBack, Window,
    design_stream,
};
use kvlathe_codec::{LayerShape, Pairing, Rope};

/// Roughly Gaussian noise (sum of twelve uniforms), deterministic.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Tokens with a mean and very unequal, correlated components.
fn tokens(seed: u64, n: usize, d: usize) -> Vec<f32> {
    let z = gaussian(seed, n * d);
    (0..n * d)
        .map(|at| {
            let (t, i) = (at / d, at % d);
            let shared = z[t * d];
            2.0 / (1.0 + i as f32) * z[at] + 0.5 * shared + if i == 1 { 3.0 } else { 0.0 }
        })
        .collect()
}

#[test]
fn coefficients_are_uncorrelated_with_unit_variance() {
    let (d, n) = (8, 20_000);
    let x = tokens(3, n, d);
    let mut moments = StreamMoments::new(d);
    moments.add(&x, Some(&gaussian(4, n * d)), None).unwrap();
    let basis = design_stream(&moments, None, &Metric::Fisher, &DesignOptions::default()).unwrap();

    // V·Vᵀ must be the covariance of the shapes, computed here from scratch.
    let mut mean = vec![0.0f64; d];
    let mut outer = vec![0.0f64; d * d];
    for token in x.chunks_exact(d) {
        let gain = (token.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / d as f64).sqrt();
        for i in 0..d {
            mean[i] += f64::from(token[i]) / gain / n as f64;
            for j in 0..d {
                outer[i * d + j] += f64::from(token[i]) * f64::from(token[j]) / gain / gain / n as f64;
            }
        }
    }
    for i in 0..d {
        assert!((mean[i] - f64::from(basis.mean[i])).abs() < 1e-5);
        for j in 0..d {
            let v: f64 = (0..d)
                .map(|k| f64::from(basis.synthesis[i * d + k]) * f64::from(basis.synthesis[j * d + k]))
                .sum();
            assert!((v - (outer[i * d + j] - mean[i] * mean[j])).abs() < 1e-4, "({i}, {j})");
        }
    }
    assert!(basis.importance.windows(2).all(|w| w[0] >= w[1]), "importances fall");
}

#[test]
fn turning_back_removes_rope() {
    let (d, n) = (8, 512);
    let rope = Rope::new(Pairing::HalfSplit, d, vec![1.0, 0.3, 0.1, 0.01]).unwrap();
    let plain = tokens(5, n, d);
    let mut rotated = plain.clone();
    for (t, token) in rotated.chunks_exact_mut(d).enumerate() {
        rope.rotation(100 + t as i64).apply(token);
    }
    let (mut a, mut b) = (StreamMoments::new(d), StreamMoments::new(d));
    a.add(&plain, None, None).unwrap();
    b.add(&rotated, None, Some(&TurnBack::new(&rope, 100, n))).unwrap();
    let options = DesignOptions { block_len: 8, shrinkage: 1.0 };
    let metric = Metric::Given((0..d * d).map(|i| f64::from(u8::from(i % (d + 1) == 0))).collect());
    let (a, b) = (
        design_stream(&a, None, &metric, &options).unwrap(),
        design_stream(&b, None, &metric, &options).unwrap(),
    );
    for (x, y) in a.importance.iter().zip(&b.importance) {
        assert!((x - y).abs() < 1e-3 * a.importance[0]);
    }
}

fn window(x: &[f32]) -> Window<'_> {
    Window { layer: 0, side: Side::Key, first_position: 0, x, gradients: None }
}

#[test]
fn too_little_text_and_broken_activations_are_refused() {
    let rope = Arc::new(Rope::new(Pairing::HalfSplit, 8, vec![1.0, 0.3, 0.1, 0.01]).unwrap());
    let layer =
        CalibratedLayer { shape: LayerShape { n_kv_heads: 2, key_dim: 8, value_dim: 8 }, rope: Some(rope) };
    let mut moments = ModelMoments::new(ModelShape { layers: vec![Some(layer)] });
    let mut x = tokens(1, 8, 8);
    moments.add(window(&x)).unwrap();
    assert!(moments.design(&DesignOptions::default(), 4).unwrap_err().to_string().contains("too few"));
    x[3] = f32::NAN;
    assert!(moments.add(window(&x)).unwrap_err().to_string().contains("NaN"));
    assert!(moments.add(window(&x[..7])).is_err());
    assert_eq!(moments.n_tokens(), 4, "refused windows leave no trace");
}
