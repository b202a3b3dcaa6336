//! Expected costs by their formula, and importances that a measurement has put right.

use std::path::PathBuf;

use kvlathe::codec::Width;
use kvlathe::preset::Preset;
use kvlathe::{Error, expected_costs, with_bits, with_cost_factors};

fn golden(name: &str) -> Preset {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kvlathe-preset/tests/golden");
    Preset::read(folder.join(name)).unwrap()
}

#[test]
fn a_cost_is_the_sum_of_importance_times_distortion() {
    let mut preset = golden("lathe-v1.safetensors");
    let n = preset.meta().head_dim;
    for stream in &mut preset.layers[0].key.streams {
        stream.importance = (1..=n).map(|i| i as f32).collect();
        stream.widths = [0, 1, 2, 3, 4, 8].into_iter().cycle().take(n).collect();
    }
    let distortions: Vec<f64> = [Width::W0, Width::W1, Width::W2, Width::W3, Width::W4, Width::W8]
        .into_iter()
        .cycle()
        .take(n)
        .map(Width::distortion)
        .collect();
    let of_one: f64 = distortions.iter().zip(1..).map(|(d, i)| d * f64::from(i)).sum();
    let cost = expected_costs(&preset).unwrap()[0][0];
    assert!((cost - of_one * preset.layers[0].key.streams.len() as f64).abs() < 1e-9 * cost);
}

#[test]
fn factors_scale_costs_and_are_recorded() {
    let preset = golden("lathe-v1.safetensors");
    let factors: Vec<[f64; 2]> = (0..preset.layers().len()).map(|i| [0.5 + i as f64, 4.0]).collect();
    let scaled = with_cost_factors(&preset, &factors).unwrap();
    let lathe = scaled.lathe().unwrap();
    assert_eq!((lathe.bits_per_value, lathe.measured.is_empty()), (0.0, true));
    assert_eq!(lathe.calibration["cost_factors"], serde_json::json!(factors));
    // Without bits a cost is the sum of importances.
    let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
    for ((costs, factors), layer) in
        expected_costs(&scaled).unwrap().iter().zip(&factors).zip(preset.layers())
    {
        for (cost, factor, side) in [(costs[0], factors[0], &layer.key), (costs[1], factors[1], &layer.value)]
        {
            let expected: f64 = side.streams.iter().map(|s| sum(&s.importance)).sum::<f64>() * factor;
            assert!((cost - expected).abs() <= 1e-6 * expected, "{cost} {expected}");
        }
    }
    assert!(with_bits(&scaled, 5.0).unwrap().lathe().unwrap().bits_per_value > 4.0);
}

#[test]
fn what_is_no_factor_is_refused() {
    let preset = golden("lathe-v1.safetensors");
    let n = preset.layers().len();
    assert!(matches!(with_cost_factors(&preset, &vec![[1.0; 2]; n + 1]), Err(Error::FactorCount { .. })));
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let mut factors = vec![[1.0; 2]; n];
        factors[n - 1][1] = bad;
        assert!(matches!(with_cost_factors(&preset, &factors), Err(Error::Factor { .. })), "{bad}");
    }
}
