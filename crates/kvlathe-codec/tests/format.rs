//! The format: kernels against the reference, bounds of the quantiser, packing.

use kvlathe_codec::gain::{BlockGain, GUARD_SCALES};
use kvlathe_codec::{
    BLOCK_LENS, Basis, CodecError, Pairing, Rope, Scratch, StreamTables, Tokens, WIDTHS, Width,
    available_isas, pack_plane, plane_bytes, reference, side_information_bytes, unpack_plane,
};
use proptest::prelude::*;

/// Deterministic noise in (−1, 1): splitmix64.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn basis(seed: u64, d: usize, widths: impl Fn(usize) -> Width) -> Basis {
    let mut synthesis = noise(seed, d * d);
    (0..d).for_each(|i| synthesis[i * d + i] += 3.0);
    Basis {
        mean: noise(seed + 1, d),
        synthesis,
        importance: (0..d).map(|i| 1.0 / (1.0 + i as f32)).collect(),
        widths: (0..d).map(widths).collect(),
    }
}

fn mixed(i: usize) -> Width {
    WIDTHS[(i * 7 + 3) % WIDTHS.len()]
}

/// The component-major frame vectors that `encode_block` hands to its kernel.
fn frame_vectors(x: &[f32], d: usize, n: usize, rope: Option<&Rope>, centre: i64) -> Vec<f32> {
    let mut frame = vec![0.0; d * n];
    for t in 0..n {
        let mut token = x[t * d..(t + 1) * d].to_vec();
        if let Some(rope) = rope {
            rope.rotation(-centre).apply(&mut token);
        }
        (0..d).for_each(|j| frame[j * n + t] = token[j]);
    }
    frame
}

#[test]
fn every_isa_gives_the_bytes_and_values_of_the_reference() {
    for (d, n) in [(64, 32), (80, 16), (128, 64), (96, 8), (5, 32)] {
        let rope = (d % 2 == 0).then(|| {
            Rope::new(Pairing::HalfSplit, d / 2, (0..d / 4).map(|i| 0.5f64.powi(i as i32)).collect()).unwrap()
        });
        let tables = StreamTables::new(&basis(9, d, mixed), rope.as_ref(), n).unwrap();
        let mut x = noise(77, d * n);
        x.iter_mut().enumerate().for_each(|(i, v)| *v *= (1.0 + (i / d) as f32).powi(2));
        x[3 * d..4 * d].fill(0.0);
        x[4 * d] = 5e4;
        let centre = 1000 + (n / 2) as i64;
        let frame = frame_vectors(&x, d, n, rope.as_ref(), centre);
        let expected = reference::encode(&tables, &frame);
        let expected_values = reference::decode(&tables, &expected);
        let (back, forth) = match &rope {
            Some(r) => (Some(r.rotation(-centre)), Some(r.rotation(centre))),
            None => (None, None),
        };
        for isa in available_isas() {
            let (mut packed, mut scratch) = (vec![0; tables.block_bytes()], Scratch::default());
            let tokens = Tokens { data: &x, token_stride: d };
            tables.encode_block(isa, tokens, back.as_ref(), &mut packed, &mut scratch).unwrap();
            assert_eq!(packed, expected, "{} d={d} n={n}", isa.name());
            let mut out = vec![0.0f32; d * n];
            tables.decode_block(isa, &packed, None, &mut out, &mut scratch).unwrap();
            for t in 0..n {
                for j in 0..d {
                    assert_eq!(
                        out[t * d + j].to_bits(),
                        expected_values[j * n + t].to_bits(),
                        "{}",
                        isa.name()
                    );
                }
            }
            // With the frame turned forward again, the decoded keys are near the originals.
            tables.decode_block(isa, &packed, forth.as_ref(), &mut out, &mut scratch).unwrap();
            assert!(out.iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn zero_tokens_decode_to_zero() {
    let tables = StreamTables::new(&basis(1, 32, |_| Width::W4), None, 8).unwrap();
    let packed = reference::encode(&tables, &vec![0.0; 32 * 8]);
    assert!(reference::decode(&tables, &packed).iter().all(|&v| v == 0.0));
}

#[test]
fn dropping_every_coefficient_leaves_gain_times_mean_and_drift() {
    let mut basis = basis(2, 16, |_| Width::W0);
    let rms = (basis.mean.iter().map(|m| m * m).sum::<f32>() / 16.0).sqrt();
    basis.mean.iter_mut().for_each(|m| *m /= rms);
    let tables = StreamTables::new(&basis, None, 8).unwrap();
    assert_eq!(tables.block_bytes(), side_information_bytes(16, 8), "only side information is stored");

    // Tokens that are the mean, at gains that have codes of their own.
    let mut x: Vec<f32> = (0..16 * 8).map(|at| basis.mean[at / 8] * 2f32.powi((at % 8) as i32)).collect();
    let decoded = reference::decode(&tables, &reference::encode(&tables, &x));
    assert!(x.iter().zip(&decoded).all(|(x, y)| (x - y).abs() <= 1e-5 * x.abs()), "{x:?} {decoded:?}");

    // What all tokens have in common beside it is kept to half a level of drift; what one has alone is not.
    let shift = |i: usize| (0..16).map(|j| 0.7 * basis.synthesis[j * 16 + i]).collect::<Vec<f32>>();
    for (at, value) in x.iter_mut().enumerate() {
        let (j, t) = (at / 8, at % 8);
        let alone = if t == 5 { shift(3)[j] } else { 0.0 };
        *value = 2f32.powi(t as i32) * (basis.mean[j] + shift(9)[j] + alone);
    }
    let decoded = reference::decode(&tables, &reference::encode(&tables, &x));
    let error = |t: usize| -> f32 {
        let [size, off] = [0, 1].map(|side| {
            let part = |j: usize| if side == 0 { x[j * 8 + t] } else { x[j * 8 + t] - decoded[j * 8 + t] };
            (0..16).map(|j| part(j).powi(2)).sum::<f32>().sqrt()
        });
        off / size
    };
    assert!(
        (0..8).filter(|&t| t != 5).all(|t| error(t) < 0.25),
        "{:?}",
        (0..8).map(error).collect::<Vec<_>>()
    );
    assert!(error(5) > 0.3);
}

/// Placeholders in front of a sequence's first coded tokens cost these nothing.
#[test]
fn zero_vectors_have_no_say_in_the_drift() {
    let mut basis = basis(7, 16, |_| Width::W0);
    basis.synthesis = (0..256).map(|at| if at % 17 == 0 { 1.0 } else { 0.0 }).collect();
    let tables = StreamTables::new(&basis, None, 8).unwrap();
    let rms = ((0..16).map(|j| (basis.mean[j] + 0.9).powi(2)).sum::<f32>() / 16.0).sqrt();
    let token = |j: usize| (basis.mean[j] + 0.9) / rms;
    for n_zero in [0, 3, 7] {
        let x: Vec<f32> = (0..16 * 8).map(|at| if at % 8 < n_zero { 0.0 } else { token(at / 8) }).collect();
        let decoded = reference::decode(&tables, &reference::encode(&tables, &x));
        for (at, (x, decoded)) in x.iter().zip(&decoded).enumerate() {
            let (step, zero) = (0.1875, at % 8 < n_zero);
            assert!(
                (x - decoded).abs() <= if zero { 0.0 } else { 0.51 * step * 1.02 },
                "{n_zero}: {x} {decoded}"
            );
        }
    }
}

/// A huge coefficient of one token does not take the others with it.
#[test]
fn outliers_hardly_move_the_drift() {
    let mut basis = basis(5, 16, |_| Width::W0);
    basis.synthesis = (0..256).map(|at| if at % 17 == 0 { 1.0 } else { 0.0 }).collect();
    basis.mean = vec![0.0; 16];
    let tables = StreamTables::new(&basis, None, 64).unwrap();
    let mut x = noise(6, 16 * 64);
    let before = reference::decode(&tables, &reference::encode(&tables, &x));
    x[7] = 1e6;
    let after = reference::decode(&tables, &reference::encode(&tables, &x));
    // One of 64 tokens moves the mean by at most 4/64, a third of a level.
    for t in (0..64).filter(|&t| t != 7) {
        let size = (0..16).map(|j| x[j * 64 + t].powi(2)).sum::<f32>().sqrt() / 4.0;
        for j in 0..16 {
            // The gain's spacing is coarse beside the outlier.
            assert!((before[j * 64 + t] - after[j * 64 + t]).abs() <= 0.6 * size, "token {t}");
        }
    }
}

/// Its inverse has entries beyond float32.
#[test]
fn nearly_singular_bases_are_refused() {
    let d = 16;
    let mut basis = basis(1, d, |_| Width::W4);
    let entry = |at: usize| match at % (d + 1) {
        0 => 6e-5,
        1 => 1.0,
        _ => 0.0,
    };
    basis.synthesis = (0..d * d).map(entry).collect();
    assert_eq!(StreamTables::new(&basis, None, 8).err(), Some(CodecError::SingularBasis));
}

proptest! {
    #[test]
    fn packing_round_trips(seed: u64, block in 0usize..BLOCK_LENS.len()) {
        let n = BLOCK_LENS[block];
        for width in WIDTHS.into_iter().skip(1) {
            let codes: Vec<u8> = noise(seed, n).iter().map(|v| (v.to_bits() >> 3) as u8 & ((1u16 << width.bits()) - 1) as u8).collect();
            let mut plane = vec![0; plane_bytes(width, n)];
            pack_plane(width, &codes, &mut plane);
            let mut unpacked = vec![0; n];
            unpack_plane(width, &plane, &mut unpacked);
            prop_assert_eq!(&unpacked, &codes);
        }
    }

    /// With all coefficients stored at eight bits, each is off by at most half its scaled step (no clipping), so
    /// |V⁻¹(x̂ − x)/γ̂| ≤ Δ·s/2 in every coefficient.
    #[test]
    fn eight_bits_stay_within_half_a_step(seed: u64, spread in 0.0f32..6.0, outlier in 0usize..64, size in 0i32..20) {
        let (d, n) = (16, 8);
        let basis = Basis {
            mean: vec![0.0; d],
            synthesis: (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect(),
            importance: vec![1.0; d],
            widths: vec![Width::W8; d],
        };
        let tables = StreamTables::new(&basis, None, n).unwrap();
        let mut x = noise(seed, d * n);
        for v in &mut x { *v *= (spread * *v).exp() * 2f32.powi(size); }
        x[outlier] *= 1000.0;
        let packed = reference::encode(&tables, &x);
        let decoded = reference::decode(&tables, &packed);
        for t in 0..n {
            let block = BlockGain::unpack(u16::from_le_bytes([packed[0], packed[1]]));
            let (gain, scale) = block.unpack_side(packed[2 + t]);
            // √d, the rounding of the gain and the drift bound a coefficient, so the guard never reaches its last factor.
            prop_assert!(scale < GUARD_SCALES[15]);
            for j in 0..d {
                let error = (decoded[j * n + t] - x[j * n + t]).abs();
                // The encoder may prefer to clip when that costs less in sum: then the summed bound still holds.
                let bound = gain * Width::W8.step() * scale * 0.5 * (d as f32).sqrt() * 2.0;
                prop_assert!(error <= bound * 1.001 + 1e-30, "token {} error {} bound {}", t, error, bound);
            }
        }
    }
}
