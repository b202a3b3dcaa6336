//! Blocks on their way from one layer into another, damaged or not. What belongs there is taken, and the layer is the same
//! to the bit wherever the bytes lie; all else is refused by an error that says the truth, and changes nothing.

use kvlathe::cache::{
    AttentionOptions, Block, BlockMismatch, Bytes, CacheError, Coding, ExportedSide, LayerCache, Policy,
    Tensor,
};
use kvlathe::codec::gain::MAX_MAGNITUDE;
use kvlathe::codec::{Digest, Element, Side};

use crate::small_layer::{DIM, HEADS, codings, empty, id, policy};
use crate::source::Source;

/// Positions of first tokens that are taken for such.
const MAX_POSITION: usize = 1 << 48;

/// Keys and values.
type Sides<E> = [ExportedSide<E>; 2];

pub(crate) fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    match source.below(3) {
        0 => exchange::<f32>(&mut source),
        1 => exchange::<half::bf16>(&mut source),
        _ => exchange::<half::f16>(&mut source),
    }
}

fn exchange<E: Element>(source: &mut Source<'_>) {
    let (codings, policy_of_both, batch) = (codings(source), policy(source), 1 + source.below(3));
    let Some(mut layer) = empty::<E>(&codings, policy_of_both, batch) else { return };
    fill(&mut layer, source);
    let sound = Side::ALL.map(|side| layer.export_side(side).expect("codecs with names"));

    // A mapped file has them at any address.
    let offset = source.below(9);
    let moved = elsewhere(&sound, offset);
    let mut twin = empty(&codings, policy_of_both, batch).expect("as before");
    // But for a layer that was cropped to where its window would show tokens that are gone.
    if layer.first() <= policy_of_both.first_seen(layer.n_tokens()) {
        import(&mut twin, &moved).expect("what has come out goes in");
        check_taken(&twin, &moved);
        assert_eq!(contents(&twin), contents(&layer));
    }

    let other_policy = if source.below(4) == 0 { policy(source) } else { policy_of_both };
    let mut target = empty::<E>(&codings, other_policy, batch).expect("as before");
    let mut given = moved;
    for _ in 0..source.below(4) {
        damage(&mut given, source);
    }
    let belongs = |sides: &Sides<E>| belongs(sides, &codings, other_policy, batch);
    match import(&mut target, &given) {
        Ok(()) => {
            assert!(belongs(&given), "taken, although it does not belong here");
            check_taken(&target, &given);
            use_up(&mut target, source);
        }
        Err(error) => {
            assert!(!belongs(&given), "refused, although it belongs here: {error}");
            check_error(&error, &given);
            let memory = target.memory_use();
            assert_eq!((target.n_tokens(), memory.coded_bytes, memory.exact_bytes), (0, 0, 0), "{error}");
            if belongs(&sound) {
                import(&mut target, &sound).expect("the layer is as it was");
                check_taken(&target, &sound);
            }
        }
    }
}

/// Some tokens, coded as far as they are due, of which some may have gone again.
fn fill<E: Element>(layer: &mut LayerCache<E>, source: &mut Source<'_>) {
    for _ in 0..1 + source.below(4) {
        append(layer, source.below(60), source);
        match source.below(4) {
            0 => {}
            1 => layer.compress(1).expect("finite"),
            _ => layer.settle(1).expect("finite"),
        }
        if source.below(4) == 0 {
            let held = layer.n_tokens() - layer.first();
            layer.crop(source.below(20).min(held)).expect("so many are held");
        }
    }
}

fn append<E: Element>(layer: &mut LayerCache<E>, n_tokens: usize, source: &mut Source<'_>) {
    let mut serial = usize::from(source.any::<u16>());
    let [keys, values] = [(); 2].map(|()| {
        Tensor::from_fn([layer.batch(), HEADS, n_tokens, DIM], || {
            serial += 1;
            E::from_f32((serial as f32 * 0.61).sin() * (1 + serial % 7) as f32)
        })
    });
    layer.append(keys.view(), values.view()).expect("finite");
}

fn import<E: Element>(layer: &mut LayerCache<E>, [keys, values]: &Sides<E>) -> Result<(), CacheError> {
    layer.import(keys.as_parts(), values.as_parts())
}

/// The same with all bytes behind `offset` others.
fn elsewhere<E: Element>(sides: &Sides<E>, offset: usize) -> Sides<E> {
    let mut sides = sides.clone();
    for block in sides.iter_mut().flat_map(|side| &mut side.blocks).flatten() {
        block.bytes = Bytes::from([&vec![0xa5; offset], &block.bytes[..]].concat()).slice(offset..);
    }
    sides
}

/// One change of what is given.
fn damage<E: Element>(sides: &mut Sides<E>, source: &mut Source<'_>) {
    let kind = source.below(20);
    let side = &mut sides[source.below(2)];
    let row = source.below(side.blocks.len().max(1));
    let other_row = source.below(side.blocks.len().max(1));
    let n_blocks = side.blocks.get(row).map_or(0, Vec::len);
    let at = source.below(n_blocks.max(1));
    match kind {
        0..9 => {
            if let Some(block) = side.blocks.get_mut(row).and_then(|row| row.get_mut(at)) {
                damage_block(block, kind, source);
            }
        }
        9 if n_blocks > 0 => side.blocks[row].swap(at, source.below(n_blocks)),
        10 if n_blocks > 0 => drop(side.blocks[row].remove(at)),
        11 if n_blocks > 0 => {
            let twin = side.blocks[row][at].clone();
            side.blocks[row].insert(source.below(n_blocks + 1), twin);
        }
        12 => side.blocks.iter_mut().for_each(|blocks| drop(blocks.pop())),
        13 => side.blocks.iter_mut().for_each(|blocks| drop(blocks.drain(..1.min(blocks.len())))),
        14 if !side.blocks.is_empty() => side.blocks.swap(row, other_row),
        15 => side.blocks.truncate(row),
        16 => side.blocks.push(side.blocks.first().cloned().unwrap_or_default()),
        17 => side.first = source.one_of(&[0, 1, side.first + 8, MAX_POSITION, usize::MAX]),
        18 => sides.swap(0, 1),
        _ => {
            let exact = if source.any() { &mut side.sinks } else { &mut side.tail };
            damage_tensor(exact, source);
        }
    }
}

fn damage_block(block: &mut Block, kind: usize, source: &mut Source<'_>) {
    let mut bytes = block.bytes.to_vec();
    let at = source.below(bytes.len().max(1));
    match kind {
        0 => {
            let mut digest = *block.id.digest.as_bytes();
            digest[source.below(32)] ^= source.any::<u8>();
            block.id.digest = Digest::from(digest);
        }
        1 => block.id.layer ^= usize::from(source.any::<u8>()),
        2 => block.id.side = source.one_of(&Side::ALL),
        3 => block.first_position = usize::from(source.any::<u16>()),
        4 => block.first_position = block.first_position.wrapping_sub(source.one_of(&[1, 8, 16])),
        5 => bytes.truncate(at),
        6 => bytes.extend((0..source.below(9)).map(|_| 0xa5)),
        7 if !bytes.is_empty() => bytes[at] ^= source.any::<u8>(),
        _ => bytes.fill_with(|| source.any()),
    }
    block.bytes = Bytes::from(bytes);
}

/// Another shape, or another number in it.
fn damage_tensor<E: Element>(tensor: &mut Tensor<E>, source: &mut Source<'_>) {
    let mut shape = tensor.view().shape();
    if source.any() {
        if let Some(value) = tensor.data_mut().get_mut(usize::from(source.any::<u8>())) {
            *value = E::from_f32(source.activation());
        }
        return;
    }
    let dimension = source.one_of(&[2, 2, 2, 0, 1, 3]);
    shape[dimension] = source.one_of(&[shape[dimension] + 1, shape[dimension].saturating_sub(1), 0]);
    *tensor = Tensor::from_fn(shape, || E::from_f32(source.small()));
}

/// Whether a layer may take these parts: what `LayerCache::import` promises, told anew.
fn belongs<E: Element>(sides: &Sides<E>, codings: &[Coding; 2], policy: Policy, batch: usize) -> bool {
    let mut ends = Vec::new();
    for ((side, coding), which) in sides.iter().zip(codings).zip(Side::ALL) {
        let fits = |tensor: &Tensor<E>| {
            let [rows, heads, _, dim] = tensor.view().shape();
            let tame = |v: &E| v.to_f32().abs() <= MAX_MAGNITUDE;
            (rows, heads, dim) == (batch, HEADS, DIM)
                && (matches!(coding, Coding::Exact) || tensor.data().iter().all(tame))
        };
        let n_blocks = side.blocks.first().map_or(0, Vec::len);
        let alike = side.blocks.len() == batch && side.blocks.iter().all(|row| row.len() == n_blocks);
        if side.first > MAX_POSITION || !fits(&side.sinks) || !fits(&side.tail) || !alike {
            return false;
        }
        let (n_sinks, n_tail) = (side.sinks.view().n_tokens(), side.tail.view().n_tokens());
        let sinks_end = side.first + n_sinks;
        let Coding::Blocks(set) = coding else {
            if n_sinks + n_blocks > 0 {
                return false;
            }
            ends.push(side.first + n_tail);
            continue;
        };
        // Sinks are the first tokens and no others; what is behind them comes when all of them are there.
        let (is_over, is_short) = (sinks_end > policy.n_sinks, sinks_end < policy.n_sinks);
        if (is_over && n_sinks > 0) || (is_short && n_blocks + n_tail > 0) {
            return false;
        }
        let len = set.block_len();
        let place = |at: usize| (sinks_end / len + at) * len;
        let right = |at: usize, block: &Block| {
            block.id == id(which)
                && block.first_position == place(at)
                && block.bytes.len() == set.block_bytes()
        };
        if !side.blocks.iter().all(|row| row.iter().enumerate().all(|(at, block)| right(at, block))) {
            return false;
        }
        ends.push(if n_blocks > 0 { place(n_blocks) } else { sinks_end } + n_tail);
    }
    // What the window still shows must be there.
    let first_seen = policy.first_seen(ends[0]);
    ends[0] == ends[1] && sides.iter().all(|side| side.first <= first_seen)
}

/// That a layer holds what it was given, and where it was given.
fn check_taken<E: Element>(layer: &LayerCache<E>, given: &Sides<E>) {
    let memory = layer.memory_use();
    assert_eq!(memory.coded_bytes, memory.foreign_bytes);
    for (side, given) in Side::ALL.into_iter().zip(given) {
        let held = layer.export_side(side).expect("codecs with names");
        assert_eq!((held.first, &held.blocks), (given.first, &given.blocks));
        for (held, given) in held.blocks.iter().flatten().zip(given.blocks.iter().flatten()) {
            assert_eq!(held.bytes.as_ptr(), given.bytes.as_ptr(), "nothing is copied");
        }
        assert_eq!(bits(held.sinks.data()), bits(given.sinks.data()));
        assert_eq!(bits(held.tail.data()), bits(given.tail.data()));
    }
}

/// That an error names a difference that there is.
fn check_error<E: Element>(error: &CacheError, given: &Sides<E>) {
    assert!(!error.to_string().is_empty());
    let CacheError::WrongBlock { row, index, mismatch } = error else { return };
    let found = given.iter().zip(Side::ALL).any(|(side, which)| {
        let Some(block) = side.blocks.get(*row).and_then(|blocks| blocks.get(*index)) else { return false };
        let right = id(which);
        match *mismatch {
            BlockMismatch::Digest { given, expected } => {
                given == block.id.digest && expected == right.digest && given != expected
            }
            BlockMismatch::Layer { given, expected } => {
                given == block.id.layer && expected == right.layer && given != expected
            }
            BlockMismatch::Side { given, expected } => {
                given == block.id.side && expected == which && given != expected
            }
            BlockMismatch::Position { given, expected } => given == block.first_position && given != expected,
            BlockMismatch::Length { given, expected } => given == block.bytes.len() && given != expected,
            _ => false,
        }
    });
    assert!(found, "{error}");
}

/// Keys, values and attention, by bits.
fn contents<E: Element>(layer: &LayerCache<E>) -> Vec<u32> {
    let tokens = layer.first()..layer.n_tokens();
    let mut all = vec![E::default(); layer.batch() * HEADS * tokens.len() * DIM];
    let mut contents = Vec::new();
    for side in Side::ALL {
        layer.read(side, tokens.clone(), &mut all, tokens.len(), 1).expect("they are held");
        contents.extend(bits(&all));
    }
    for n_queries in [1, 40] {
        contents.extend(attend(layer, n_queries).unwrap_or_default());
    }
    contents
}

/// What some queries find and their log-sum-exp, where the layer can tell.
fn attend<E: Element>(layer: &LayerCache<E>, n_queries: usize) -> Option<Vec<u32>> {
    let n_queries = n_queries.min(layer.n_tokens());
    let mut serial = 0;
    let queries = Tensor::from_fn([layer.batch(), 2 * HEADS, n_queries, DIM], || {
        serial += 1;
        E::from_f32((serial as f32 * 0.37).sin())
    });
    let n = queries.data().len();
    let (mut out, mut lse) = (vec![E::default(); n], vec![0.0; n / DIM]);
    match layer.attend(queries.view(), AttentionOptions::default(), &mut out, Some(&mut lse), 1) {
        Ok(()) => {
            assert!(out.iter().all(|v| !v.to_f32().is_nan()), "any bytes are numbers");
            Some([bits(&out), lse.iter().map(|v| v.to_bits()).collect()].concat())
        }
        Err(CacheError::NotFused | CacheError::Forgotten { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// What a layer that holds anybody's blocks may be asked for next.
fn use_up<E: Element>(layer: &mut LayerCache<E>, source: &mut Source<'_>) {
    contents(layer);
    for _ in 0..source.below(4) {
        let before = layer.n_tokens();
        let n_new = source.below(40);
        append(layer, n_new, source);
        contents(layer);
        layer.settle(1).expect("finite");
        assert_eq!(layer.n_tokens(), before + n_new);
        let held = layer.n_tokens() - layer.first();
        layer.crop(source.below(60).min(held)).expect("so many are held");
        layer.select(&[0, layer.batch() - 1]).expect("rows that exist");
        contents(layer);
    }
}

fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|v| v.to_f32().to_bits()).collect()
}
