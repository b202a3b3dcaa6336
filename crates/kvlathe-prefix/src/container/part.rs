//! The pieces that a container consists of, in their order.

use std::fmt;

use kvlathe_codec::Side;

use super::header::Header;

/// One side of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub layer: usize,
    /// Keys or values.
    pub side: Side,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}, {}s", self.layer, self.side.name())
    }
}

/// A part of a file, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The first 64 bytes.
    Prelude,
    /// Header and table of pieces.
    Header,
    /// The tokens' ids.
    TokenIds,
    /// A side's exact first tokens.
    Sinks(Place),
    /// A side's exact last tokens.
    Tail(Place),
    /// A packed block.
    Block {
        /// Whose.
        place: Place,
        /// Of the batch.
        row: usize,
        /// Among the row's blocks.
        index: usize,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prelude => f.write_str("its first 64 bytes"),
            Self::Header => f.write_str("its header"),
            Self::TokenIds => f.write_str("the token ids"),
            Self::Sinks(place) => write!(f, "the sinks ({place})"),
            Self::Tail(place) => write!(f, "the tail ({place})"),
            Self::Block { place, row, index } => write!(f, "block {index} of row {row} ({place})"),
        }
    }
}

/// All pieces in the order of the table, and how many bytes each has. The header has been checked.
pub(super) fn pieces(header: &Header) -> impl Iterator<Item = (Part, usize)> {
    let ids = header.has_token_ids.then(|| (Part::TokenIds, header.token_id_bytes()));
    let layers = header.layers.iter().enumerate().filter_map(|(at, layer)| Some((at, layer.as_ref()?)));
    ids.into_iter().chain(layers.flat_map(move |(at, layer)| {
        Side::ALL.into_iter().flat_map(move |side| {
            let (place, shape) = (Place { layer: at, side }, layer.side(side));
            let exact = |n_tokens| layer.exact_bytes(side, header.batch, n_tokens);
            let sinks = (Part::Sinks(place), exact(shape.n_sinks));
            let tail = (Part::Tail(place), exact(shape.n_tail));
            let blocks = (0..header.batch).flat_map(move |row| {
                (0..shape.n_blocks).map(move |index| (Part::Block { place, row, index }, shape.block_bytes))
            });
            [sinks, tail].into_iter().chain(blocks)
        })
    }))
}
