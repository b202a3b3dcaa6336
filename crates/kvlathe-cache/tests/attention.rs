//! Attention from the blocks against "read all tokens, then dense attention in f64".

use std::num::NonZeroUsize;
use std::sync::Arc;

use half::bf16;
use kvlathe_cache::{AttentionOptions, CacheError, Coding, LayerCache, Policy, TensorView};
use kvlathe_codec::{Basis, Element, Pairing, Rope, Side, StreamSet, Width};

fn wave(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 11 + seed * 29) as f32 * 0.517).sin() * (0.5 + (i % 7) as f32 / 3.0)).collect()
}

fn stream_set(heads: usize, d: usize, rope: bool) -> Coding {
    let basis = |head: usize| {
        let mut synthesis: Vec<f32> = wave(head, d * d).iter().map(|v| v * 0.1).collect();
        (0..d).for_each(|i| synthesis[i * d + i] += 1.0);
        let widths: Vec<Width> =
            [Width::W8, Width::W4, Width::W4, Width::W2, Width::W0].into_iter().cycle().take(d).collect();
        // As calibration gives it: about the same distortion from each coded coefficient.
        for (i, value) in synthesis.iter_mut().enumerate() {
            if widths[i % d] != Width::W0 {
                *value *= 0.2 / widths[i % d].step();
            }
        }
        Basis {
            mean: wave(head + 7, d).iter().map(|v| v * 0.2).collect(),
            synthesis,
            importance: vec![1.0; d],
            widths,
        }
    };
    let rope = rope.then(|| {
        let frequencies = (0..d / 2).map(|i| 0.8f64.powi(i as i32)).collect();
        Arc::new(Rope::new(Pairing::HalfSplit, d / 2 * 2, frequencies).unwrap())
    });
    Coding::Blocks(Arc::new(StreamSet::new(&(0..heads).map(basis).collect::<Vec<_>>(), rope, 16).unwrap()))
}

struct Case {
    batch: usize,
    heads: usize,
    group: usize,
    d: usize,
    n_tokens: usize,
    n_queries: usize,
    masked: bool,
    softcap: Option<f32>,
    sinks: bool,
    window: Option<usize>,
}

/// Fills a cache, attends, and gives the largest error against dense attention, relative to the largest value.
fn largest_error<E: Element>(case: &Case) -> f64 {
    let Case { batch, heads, group, d, n_tokens, n_queries, masked, softcap, sinks, window } = *case;
    let of_window = window.and_then(NonZeroUsize::new);
    let policy = Policy { n_sinks: 4, n_tail: 20, window: of_window, ..Policy::default() };
    let mut cache = LayerCache::<E>::new(
        stream_set(heads, d, true),
        stream_set(heads, d, false),
        policy,
        batch,
        heads,
        (d, d),
    )
    .unwrap();
    let shape = [batch, heads, n_tokens, d];
    let make = |seed| wave(seed, shape.iter().product()).into_iter().map(E::from_f32).collect::<Vec<E>>();
    let (keys, values) = (make(1), make(2));
    // The queries' own tokens come last, when what is older than the first query's window is gone.
    let of_step = |tokens: std::ops::Range<usize>, x: &[E]| -> Vec<E> {
        x.chunks_exact(n_tokens * d)
            .flat_map(|head| &head[tokens.start * d..tokens.end * d])
            .copied()
            .collect()
    };
    for tokens in [0..n_tokens - n_queries, n_tokens - n_queries..n_tokens] {
        let shape = [batch, heads, tokens.len(), d];
        let (keys, values) = (of_step(tokens.clone(), &keys), of_step(tokens.clone(), &values));
        let [keys, values] = [&keys, &values].map(|x| TensorView::contiguous(x, shape).unwrap());
        cache.append(keys, values).unwrap();
        if tokens.start == 0 {
            cache.settle(1).unwrap();
        }
    }
    assert!(n_tokens - n_queries < 60 || cache.n_coded() > 0 || window.is_some_and(|window| window < 60));
    let first = window.map_or(0, |window| (n_tokens + 1).saturating_sub(n_queries + window));
    assert!(cache.first() <= first && first - cache.first() < 16, "{} for {first}", cache.first());
    let n_seen = n_tokens - first;

    let query_heads = heads * group;
    let q: Vec<E> = wave(3, batch * query_heads * n_queries * d).into_iter().map(E::from_f32).collect();
    let in_sight = |query: usize, t: usize| {
        let place = n_tokens - n_queries + query;
        t <= place && window.is_none_or(|window| t + window > place)
    };
    let mask: Vec<u8> = (0..batch * n_queries * n_seen)
        .map(|i| {
            let (b, query, t) = (i / n_seen / n_queries, i / n_seen % n_queries, first + i % n_seen);
            u8::from(in_sight(query, t) && t >= 3 * b && t % 9 != 8)
        })
        .collect();
    let sink_scores = wave(9, query_heads);
    let scaling = 1.0 / (d as f32).sqrt();
    let options = AttentionOptions {
        scaling,
        mask: masked.then_some(&mask),
        softcap,
        sink_scores: sinks.then_some(&sink_scores[..]),
    };
    let mut out = vec![E::default(); batch * n_queries * query_heads * d];
    let view = TensorView::contiguous(&q, [batch, query_heads, n_queries, d]).unwrap();
    let mut lse = vec![f32::NAN; batch * query_heads * n_queries];
    cache.attend(view, options, &mut out, Some(&mut lse), 2).unwrap();

    let (mut k, mut v) = (keys.clone(), values.clone());
    cache.read(Side::Key, first..n_tokens, &mut k, n_tokens, 1).unwrap();
    cache.read(Side::Value, first..n_tokens, &mut v, n_tokens, 1).unwrap();
    let (mut worst, mut size) = (0.0f64, 0.0f64);
    for b in 0..batch {
        for h in 0..query_heads {
            for query in 0..n_queries {
                let at = |t: usize, j: usize| ((b * heads + h / group) * n_tokens + t) * d + j;
                let weights: Vec<f64> = (0..n_seen)
                    .map(|t| {
                        let visible = if masked {
                            mask[(b * n_queries + query) * n_seen + t] != 0
                        } else {
                            in_sight(query, first + t)
                        };
                        let dot: f64 = (0..d)
                            .map(|j| {
                                f64::from(q[((b * query_heads + h) * n_queries + query) * d + j].to_f32())
                                    * f64::from(k[at(t, j)].to_f32())
                            })
                            .sum();
                        let score = dot * f64::from(scaling);
                        let score = softcap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh());
                        if visible { score.exp() } else { 0.0 }
                    })
                    .collect();
                let total =
                    weights.iter().sum::<f64>() + if sinks { f64::from(sink_scores[h]).exp() } else { 0.0 };
                let given = f64::from(lse[(b * query_heads + h) * n_queries + query]);
                // A score's own error is 10⁻³ of the vectors' norms at most.
                let most = if size_of::<E>() == 4 { 1e-3 } else { 3e-3 } * (1.0 + total.ln().abs());
                assert!(
                    given == total.ln() || (given - total.ln()).abs() < most,
                    "{given} for {}",
                    total.ln()
                );
                for j in 0..d {
                    let expected =
                        (0..n_seen).map(|t| weights[t] * f64::from(v[at(t, j)].to_f32())).sum::<f64>()
                            / total;
                    let got = f64::from(out[((b * n_queries + query) * query_heads + h) * d + j].to_f32());
                    worst = worst.max((got - expected).abs());
                    size = size.max(expected.abs());
                }
            }
        }
    }
    worst / size
}

fn case() -> Case {
    Case {
        batch: 1,
        heads: 2,
        group: 3,
        d: 64,
        n_tokens: 700,
        n_queries: 1,
        masked: false,
        softcap: None,
        sinks: false,
        window: None,
    }
}

#[test]
fn float32_shapes() {
    for case in [
        case(),
        Case { n_tokens: 1500, ..case() },
        Case { n_tokens: 3, ..case() },
        Case { n_tokens: 40, n_queries: 40, ..case() },
        Case { group: 1, d: 80, ..case() },
        Case { group: 16, d: 128, heads: 1, ..case() },
        Case { d: 256, heads: 1, group: 2, ..case() },
        Case { d: 96, group: 2, n_queries: 2, ..case() },
        Case { n_queries: 9, ..case() },
        Case { batch: 3, masked: true, n_queries: 5, ..case() },
        Case { softcap: Some(2.0), ..case() },
        Case { sinks: true, n_queries: 2, ..case() },
        // Many queries: tiles.
        Case { n_queries: 300, ..case() },
        Case { n_queries: 61, d: 80, group: 1, ..case() },
        Case { n_queries: 100, batch: 2, masked: true, n_tokens: 333, ..case() },
        Case { n_queries: 50, softcap: Some(2.0), sinks: true, d: 128, ..case() },
        // Sliding windows: of few queries and of many, with and without a mask, wider than the sequence, of one token.
        Case { window: Some(200), ..case() },
        Case { window: Some(333), n_queries: 3, sinks: true, d: 128, ..case() },
        Case { window: Some(100), n_queries: 5, batch: 3, masked: true, ..case() },
        Case { window: Some(150), n_queries: 300, ..case() },
        Case { window: Some(150), n_queries: 70, batch: 2, masked: true, softcap: Some(2.0), ..case() },
        Case { window: Some(697), ..case() },
        Case { window: Some(9000), n_queries: 60, ..case() },
        Case { window: Some(1), ..case() },
        Case { window: Some(1), n_queries: 60, ..case() },
    ] {
        let error = largest_error::<f32>(&case);
        // Scores of packed keys are good to 10⁻⁴ of ‖q‖·‖k‖ here, which over √d grows with √d; exact tokens know only
        // float32's rounding.
        let bound = if case.n_tokens < 20 { 2e-5 } else { 2e-3 * (case.d as f64 / 64.0).sqrt().max(1.0) };
        assert!(error < bound, "{error} for d={} n={} q={}", case.d, case.n_tokens, case.n_queries);
    }
}

#[test]
fn bfloat16_within_its_rounding() {
    // The reference reads keys rounded to bfloat16; ours never rounds them: 2⁻⁸ a component, averaged down.
    assert!(largest_error::<bf16>(&Case { n_queries: 4, ..case() }) < 2e-2);
    assert!(largest_error::<bf16>(&Case { n_queries: 80, ..case() }) < 2e-2);
}

#[test]
fn queries_that_see_nothing_give_zeros() {
    let policy = Policy::default();
    let mut cache =
        LayerCache::<f32>::new(stream_set(1, 16, false), stream_set(1, 16, false), policy, 1, 1, (16, 16))
            .unwrap();
    let x = wave(1, 16 * 40);
    let view = TensorView::contiguous(&x, [1, 1, 40, 16]).unwrap();
    cache.append(view, view).unwrap();
    cache.compress(1).unwrap();
    let mut out = vec![7.0; 16];
    let options = AttentionOptions { scaling: 1.0, mask: Some(&[0; 40]), ..AttentionOptions::default() };
    cache
        .attend(TensorView::contiguous(&x[..16], [1, 1, 1, 16]).unwrap(), options, &mut out, None, 1)
        .unwrap();
    assert!(out.iter().all(|&v| v == 0.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut exact =
        LayerCache::<f32>::new(Coding::Exact, Coding::Exact, Policy::default(), 1, 2, (8, 8)).unwrap();
    let x = wave(1, 2 * 8);
    let view = TensorView::contiguous(&x, [1, 2, 1, 8]).unwrap();
    exact.append(view, view).unwrap();
    let mut out = vec![0.0; 16];
    assert_eq!(exact.attend(view, AttentionOptions::default(), &mut out, None, 1), Err(CacheError::NotFused));

    let policy = Policy::default();
    let mut cache =
        LayerCache::<f32>::new(stream_set(2, 8, false), stream_set(2, 8, false), policy, 1, 2, (8, 8))
            .unwrap();
    cache.append(view, view).unwrap();
    let three_heads = wave(1, 3 * 8);
    let queries = TensorView::contiguous(&three_heads, [1, 3, 1, 8]).unwrap();
    let message =
        cache.attend(queries, AttentionOptions::default(), &mut [0.0; 24], None, 1).unwrap_err().to_string();
    assert!(message.contains("query heads"), "{message}");
    let short_mask = AttentionOptions { mask: Some(&[1; 3]), ..AttentionOptions::default() };
    assert!(cache.attend(view, short_mask, &mut out, None, 1).is_err());
    // More queries than tokens can only be a mistake; none at all is no work.
    let none = TensorView::contiguous(&x, [1, 2, 0, 8]).unwrap();
    cache.attend(none, AttentionOptions::default(), &mut [], None, 1).unwrap();
    let many = wave(1, 2 * 3 * 8);
    let many = TensorView::contiguous(&many, [1, 2, 3, 8]).unwrap();
    let message =
        cache.attend(many, AttentionOptions::default(), &mut [0.0; 48], None, 1).unwrap_err().to_string();
    assert!(message.contains("beyond the tokens held"), "{message}");
}

/// Queries whose window begins before what is still held would get wrong attention.
#[test]
fn tokens_that_were_dropped_cannot_be_seen() {
    let (d, n_tokens) = (16, 200);
    let policy = Policy { n_sinks: 4, n_tail: 20, window: NonZeroUsize::new(100), ..Policy::default() };
    let (keys, values) = (stream_set(1, d, true), stream_set(1, d, false));
    let mut cache = LayerCache::<f32>::new(keys, values, policy, 1, 1, (d, d)).unwrap();
    let x = wave(1, n_tokens * d);
    let view = TensorView::contiguous(&x, [1, 1, n_tokens, d]).unwrap();
    cache.append(view, view).unwrap();
    cache.settle(1).unwrap();
    let first = cache.first();
    let attend = |n_queries: usize| {
        let queries = TensorView::contiguous(&x[..n_queries * d], [1, 1, n_queries, d]).unwrap();
        cache.attend(queries, AttentionOptions::default(), &mut vec![0.0; n_queries * d], None, 1)
    };
    assert_eq!(attend(60), Err(CacheError::Forgotten { wanted: 41, first }));
    attend(1).unwrap();
}

/// Broken queries must not come out as the zeros of a query that sees nothing.
#[test]
fn what_is_no_number_stays_none() {
    let (heads, d, n_tokens) = (1, 16, 100);
    let policy = Policy { n_sinks: 4, n_tail: 20, ..Policy::default() };
    let (keys, values) = (stream_set(heads, d, true), stream_set(heads, d, false));
    let mut cache = LayerCache::<f32>::new(keys, values, policy, 1, heads, (d, d)).unwrap();
    let x = wave(1, n_tokens * d);
    let view = TensorView::contiguous(&x, [1, heads, n_tokens, d]).unwrap();
    cache.append(view, view).unwrap();
    cache.compress(1).unwrap();
    assert!(cache.n_coded() > 0);
    let sound = wave(2, d);
    // NaN, and a norm beyond float32.
    for broken in [f32::NAN, 1e25] {
        let queries: Vec<f32> = [vec![broken; d], sound.clone()].concat();
        let view = TensorView::contiguous(&queries, [1, 2 * heads, 1, d]).unwrap();
        let mut out = vec![0.0; 2 * d];
        cache.attend(view, AttentionOptions::default(), &mut out, None, 2).unwrap();
        assert!(out[..d].iter().all(|v| v.is_nan()), "{broken}: {:?}", &out[..d]);
        assert!(out[d..].iter().all(|v| v.is_finite()), "the other query is not touched");
    }
    // A query that sees nothing, though, is zeros: a row of padding.
    let view = TensorView::contiguous(&sound, [1, heads, 1, d]).unwrap();
    let mask = vec![0; n_tokens];
    let mut out = vec![1.0; d];
    let options = AttentionOptions { mask: Some(&mask), ..AttentionOptions::default() };
    cache.attend(view, options, &mut out, None, 1).unwrap();
    assert!(out.iter().all(|v| *v == 0.0));
}
