//! Layers that are small enough to fuzz: every way to store a side, any policy.

use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};

use kvlathe::cache::{CacheError, Coding, LayerCache, Policy};
use kvlathe::codec::{Basis, Digest, Element, Pairing, Rope, Side, StreamId, StreamSet, WIDTHS};

use crate::source::Source;

/// KV heads.
pub(crate) const HEADS: usize = 2;
/// Components of keys and of values.
pub(crate) const DIM: usize = 8;

/// Every way to store a side: exact, rotated or not, in blocks of two lengths.
static CODINGS: LazyLock<[[Coding; 4]; 2]> = LazyLock::new(|| {
    let blocks = |side, rope: bool, block_len| {
        let rope = rope.then(|| {
            let frequencies = vec![1.0, 0.1, 0.01, 0.001];
            Arc::new(Rope::new(Pairing::HalfSplit, DIM, frequencies).expect("a rotation"))
        });
        let bases = [0.1, -0.2].map(|mean| Basis {
            mean: vec![mean; DIM],
            synthesis: (0..DIM * DIM).map(|i| if i % (DIM + 1) == 0 { 1.0 } else { 0.03 }).collect(),
            importance: vec![1.0; DIM],
            widths: (0..DIM).map(|i| WIDTHS[5 - i % 6]).collect(),
        });
        let set = StreamSet::new(&bases, rope, block_len).expect("a codec").with_id(id(side));
        Coding::Blocks(Arc::new(set))
    };
    Side::ALL
        .map(|side| [Coding::Exact, blocks(side, true, 8), blocks(side, false, 8), blocks(side, false, 16)])
});

/// The name of a side's blocks.
pub(crate) fn id(side: Side) -> StreamId {
    StreamId { digest: Digest::from([7; 32]), layer: 3, side }
}

/// How a layer stores its sides.
pub(crate) fn codings(source: &mut Source<'_>) -> [Coding; 2] {
    let at = [(); 2].map(|()| source.below(CODINGS[0].len()));
    [CODINGS[0][at[0]].clone(), CODINGS[1][at[1]].clone()]
}

/// Any policy.
pub(crate) fn policy(source: &mut Source<'_>) -> Policy {
    Policy {
        n_sinks: source.one_of(&[0, 1, 4, 5, 8, 11, 20]),
        compress_start_len: source.below(50),
        n_tail: source.below(24),
        window: source.any::<bool>().then(|| 1 + source.below(70)).and_then(NonZeroUsize::new),
    }
}

/// An empty layer, if its sides go together.
pub(crate) fn empty<E: Element>(
    [key, value]: &[Coding; 2],
    policy: Policy,
    batch: usize,
) -> Option<LayerCache<E>> {
    match LayerCache::new(key.clone(), value.clone(), policy, batch, HEADS, (DIM, DIM)) {
        Ok(layer) => Some(layer),
        Err(error) => {
            assert!(matches!(error, CacheError::BlockLen { .. }), "{error}");
            None
        }
    }
}
