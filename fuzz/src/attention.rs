//! Attention from packed blocks against attention over the same tokens, decoded and held exactly.

use std::num::NonZeroUsize;
use std::sync::Arc;

use kvlathe::cache::{AttentionOptions, Coding, LayerCache, Policy, TensorView};
use kvlathe::codec::{Rope, Side, StreamSet};

use crate::source::Source;

/// Error of a score, of ‖q‖·‖x̂‖: what `kvlathe_codec` states for bases that it was tried with.
const SCORE_ERROR: f64 = 1e-3;
/// Relative error of an output where scores are exact.
const OUTPUT_ERROR: f64 = 1e-4;

pub(crate) fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let (heads, d, block_len) =
        (1 + source.below(2), source.one_of(&[8, 16, 24, 40]), source.one_of(&[8, 16, 32]));
    let rope = source.rope(d).map(Arc::new);
    let mut coding = |rope: Option<Arc<Rope>>| {
        let bases: Vec<_> = (0..heads).map(|_| source.basis(d, true)).collect();
        StreamSet::new(&bases, rope, block_len).ok().map(|set| Coding::Blocks(Arc::new(set)))
    };
    let (Some(key), Some(value)) = (coding(rope), coding(None)) else { return };
    let mut policy = Policy {
        n_sinks: source.below(6),
        compress_start_len: source.below(64),
        n_tail: source.below(40),
        window: None,
    };
    let (batch, n) = (1 + source.below(2), 1 + source.below(150));
    let size = source.one_of(&[1.0, 1.0, 1e4, 1e-3]);
    let mut tensor = |scale: f32| source.repeat(batch * heads * n * d, |s| s.small() * scale);
    let (mut keys, mut values) = (tensor(size), tensor(size));

    let group = 1 + source.below(3);
    // Few queries go through the coefficient domain, many through tiles.
    let most_queries = source.one_of(&[4, 4, 4, 60]);
    let n_queries = (1 + source.below(most_queries)).min(n);
    let q_shape = [batch, heads * group, n_queries, d];
    let q_size = source.one_of(&[1.0, 0.1, 0.01]) / size;
    let queries = source.repeat(q_shape.iter().product(), |s| s.small() * q_size);
    policy.window = source.any::<bool>().then(|| 1 + source.below(n)).and_then(NonZeroUsize::new);

    // As a model does it: the queries' own tokens come when what was there before has been coded.
    let cache = |policy, keys: &[f32], values: &[f32]| {
        let (key, value) = (key.clone(), value.clone());
        let mut cache = LayerCache::new(key, value, policy, batch, heads, (d, d)).expect("the codecs fit");
        for (first, n_new, is_past) in [(0, n - n_queries, true), (n - n_queries, n_queries, false)] {
            let [keys, values] = [keys, values].map(|x| {
                let shape = [batch, heads, n_new, d];
                TensorView::new(&x[first * d..], shape, [heads * n * d, n * d, d]).expect("it fits")
            });
            cache.append(keys, values).expect("finite");
            if is_past {
                cache.settle(1).expect("it can be coded");
            }
        }
        cache
    };
    let packed = cache(policy, &keys, &values);
    let (first, n_held) = (packed.first(), n - packed.first());
    let mut held = vec![0.0; batch * heads * n_held * d];
    for (all, side) in [&mut keys, &mut values].into_iter().zip(Side::ALL) {
        packed.read(side, first..n, &mut held, n_held, 1).expect("it fits");
        for (all, held) in all.chunks_exact_mut(n * d).zip(held.chunks_exact(n_held * d)) {
            all[first * d..].copy_from_slice(held);
        }
    }
    let never = Policy { compress_start_len: usize::MAX, ..policy };
    let exact = cache(never, &keys, &values);

    let n_seen = policy.seen(n_queries, n).len();
    let mask = source.any::<bool>().then(|| source.repeat(batch * n_queries * n_seen, Source::any::<u8>));
    let sink_scores = source.any::<bool>().then(|| source.repeat(heads * group, Source::small));
    let softcap = source.any::<bool>().then(|| 1.0 + source.small().abs());
    let scaling = 1.0 / (d as f32).sqrt();
    let (mask, sink_scores) = (mask.as_deref(), sink_scores.as_deref());
    let options = AttentionOptions { scaling, mask, softcap, sink_scores };

    let attend = |cache: &LayerCache<f32>| {
        let mut out = vec![f32::NAN; q_shape.iter().product()];
        let view = TensorView::contiguous(&queries, q_shape).expect("it fits");
        cache.attend(view, options, &mut out, None, 1).expect("it can attend");
        out
    };
    let (given, expected) = (attend(&packed), attend(&exact));
    let longest = |x: &[f32]| {
        let norms = x.chunks_exact(d).map(|v| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt());
        norms.fold(0.0, f64::max)
    };
    let score_error = SCORE_ERROR * f64::from(scaling) * longest(&queries) * longest(&keys);
    // Every weight is off by a factor of e^±(2·error) at most.
    let most = ((2.0 * score_error).exp_m1() + OUTPUT_ERROR) * longest(&values) + 1e-30;
    for (given, expected) in given.iter().zip(&expected) {
        assert!(f64::from(given - expected).abs() <= most, "{given} for {expected}, within {most}");
    }
}
