//! Pages as containers, and back.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use kvlathe_cache::{
    Bytes, CacheError, Coding, ExportedSide, LayerCache, Policy, SideParts, Tensor, TensorView,
};
use kvlathe_codec::{Element, Side, StreamSet};

use super::Result;
use crate::container::{
    Container, Contents, Dtype, Header, LayerHeader, Place, SideContents, SideHeader, to_bytes,
};

/// The codecs of a model's layers, and how their pages are laid out.
#[derive(Debug, Clone)]
pub struct PageCodec {
    layers: Vec<[Arc<StreamSet>; 2]>,
    /// Of each layer's keys and values: where they begin among a page's; and where they end.
    offsets: Vec<[usize; 2]>,
    n_sinks: usize,
    n_tokens: usize,
}

/// What the container of a page says beside its tokens; see [`Header`].
#[derive(Debug, Clone, Copy)]
pub struct PageOrigin<'a> {
    /// Its key as text.
    pub chunk_key: &'a str,
    /// Name of the model, for people.
    pub model: &'a str,
    /// Identity of the weights.
    pub weights: &'a str,
}

impl PageCodec {
    /// Of pages of `n_tokens` tokens of layers that are coded by `layers`, keys before values; the first `n_sinks` tokens
    /// of a sequence stay exact.
    ///
    /// # Errors
    /// No layers, codecs without names, and pages that are no whole number of blocks.
    pub fn new(layers: Vec<[Arc<StreamSet>; 2]>, n_sinks: usize, n_tokens: usize) -> Result<Self> {
        let shape = |what, given, expected| Err(CacheError::Shape { what, given, expected }.into());
        let Some(block_len) = layers.first().map(|sets| sets[0].block_len()) else {
            return shape("the number of layers", 0, 1);
        };
        if n_tokens == 0 || !n_tokens.is_multiple_of(block_len) {
            return shape(
                "tokens of a page, whole blocks of them",
                n_tokens,
                n_tokens.next_multiple_of(block_len).max(block_len),
            );
        }
        for set in layers.iter().flatten() {
            if set.id().is_none() {
                return Err(CacheError::Unnamed.into());
            }
            if set.block_len() != block_len {
                return shape("tokens of a block", set.block_len(), block_len);
            }
        }
        let mut offsets = vec![[0; 2]];
        for sets in &layers {
            let end = offsets[offsets.len() - 1];
            let n_numbers = |side: usize| sets[side].streams().len() * n_tokens * sets[side].head_dim();
            offsets.push([end[0] + n_numbers(0), end[1] + n_numbers(1)]);
        }
        Ok(Self { layers, offsets, n_sinks, n_tokens })
    }

    /// Tokens of a page.
    #[must_use]
    pub const fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Numbers of a page's keys or values: `[layers, heads, n_tokens, head_dim]`.
    #[must_use]
    pub fn n_numbers(&self, side: Side) -> usize {
        self.offsets[self.layers.len()][side as usize]
    }

    /// Where those of a layer are among them.
    fn range(&self, Place { layer, side }: Place) -> Range<usize> {
        self.offsets[layer][side as usize]..self.offsets[layer + 1][side as usize]
    }

    /// Codes a page whose first token has position `first_position`. Keys and values are `[layers, heads, n_tokens,
    /// head_dim]`, as the model has rotated them. On the caller's thread: pages are many, and each is small.
    ///
    /// # Errors
    /// Another number of them, a position inside of a block, and numbers that are not finite.
    pub fn encode<E: Element>(
        &self,
        page: [&[E]; 2],
        first_position: usize,
        origin: PageOrigin<'_>,
    ) -> Result<Bytes> {
        let dtype = Dtype::of::<E>()?;
        self.check(page.map(<[E]>::len), first_position)?;
        let mut coded = Vec::with_capacity(self.layers.len());
        for (index, sets) in self.layers.iter().enumerate() {
            let exact =
                |side| self.exact_parts(page[side as usize], Place { layer: index, side }, first_position);
            let ([key_sinks, key_tail], [value_sinks, value_tail]) = (exact(Side::Key)?, exact(Side::Value)?);
            let blocks = &[Vec::new()];
            let mut layer = self.layer::<E>(sets)?;
            layer.import(
                SideParts { first: first_position, sinks: key_sinks, blocks, tail: key_tail },
                SideParts { first: first_position, sinks: value_sinks, blocks, tail: value_tail },
            )?;
            layer.settle(1)?;
            coded.push([layer.export_side(Side::Key)?, layer.export_side(Side::Value)?]);
        }
        self.written(&coded, dtype, first_position, origin)
    }

    /// Writes what [`PageCodec::encode`] was given, as coded, to `[layers, heads, n_tokens, head_dim]` of keys and values.
    ///
    /// # Errors
    /// A container of something else than such a page, and buffers of another size.
    pub fn decode<E: Element>(&self, page: &Container, out: [&mut [E]; 2]) -> Result<()> {
        let header = page.header();
        let first = header.n_tokens.saturating_sub(self.n_tokens);
        self.check([out[0].len(), out[1].len()], first)?;
        if header.layers.len() != self.layers.len() {
            let (given, expected) = (header.layers.len(), self.layers.len());
            return Err(CacheError::Shape { what: "layers of the page", given, expected }.into());
        }
        let [keys, values] = out;
        for (index, sets) in self.layers.iter().enumerate() {
            let mut layer = self.layer::<E>(sets)?;
            let place = |side| Place { layer: index, side };
            let held = |side| self.held::<E>(page, place(side), first);
            let (of_key, of_value) = (held(Side::Key)?, held(Side::Value)?);
            layer.import(of_key.as_parts(), of_value.as_parts())?;
            let tokens = first..first + self.n_tokens;
            for (side, out) in [(Side::Key, &mut *keys), (Side::Value, &mut *values)] {
                let out = &mut out[self.range(place(side))];
                layer.read(side, tokens.clone(), out, self.n_tokens, 1)?;
            }
        }
        Ok(())
    }

    /// A layer that sees one page, wherever it is.
    fn layer<E: Element>(&self, [key, value]: &[Arc<StreamSet>; 2]) -> Result<LayerCache<E>> {
        let policy = Policy {
            n_sinks: self.n_sinks,
            window: NonZeroUsize::new(self.n_tokens + 1),
            ..Policy::default()
        };
        let dims = (key.head_dim(), value.head_dim());
        let codings = [key, value].map(|set| Coding::Blocks(Arc::clone(set)));
        let [key_coding, value_coding] = codings;
        Ok(LayerCache::new(key_coding, value_coding, policy, 1, key.streams().len(), dims)?)
    }

    fn check(&self, n_numbers: [usize; 2], first_position: usize) -> Result<()> {
        let block_len = self.layers[0][0].block_len();
        if !first_position.is_multiple_of(block_len) {
            let expected = first_position / block_len * block_len;
            let what = "the position of a page's first token, where a block begins";
            return Err(CacheError::Shape { what, given: first_position, expected }.into());
        }
        for (side, given) in Side::ALL.into_iter().zip(n_numbers) {
            let expected = self.n_numbers(side);
            if given != expected {
                return Err(CacheError::Buffer { what: "page", given, expected }.into());
            }
        }
        Ok(())
    }

    /// Sinks of a page at a position.
    fn n_sinks_at(&self, first_position: usize) -> usize {
        self.n_sinks.saturating_sub(first_position).min(self.n_tokens)
    }

    /// Sinks of a layer's side and its other tokens, `[1, heads, n, head_dim]` each.
    fn exact_parts<'a, E: Element>(
        &self,
        page: &'a [E],
        place: Place,
        first_position: usize,
    ) -> Result<[TensorView<'a, E>; 2]> {
        let (of_layer, set) = (&page[self.range(place)], &self.layers[place.layer][place.side as usize]);
        let (heads, dim, n_sinks) = (set.streams().len(), set.head_dim(), self.n_sinks_at(first_position));
        let head = self.n_tokens * dim;
        let view = |from: usize, n| {
            TensorView::new(&of_layer[from * dim..], [1, heads, n, dim], [heads * head, head, dim])
        };
        Ok([view(0, n_sinks)?, view(n_sinks, self.n_tokens - n_sinks)?])
    }

    fn written<E: Element>(
        &self,
        coded: &[[ExportedSide<E>; 2]],
        dtype: Dtype,
        first_position: usize,
        origin: PageOrigin<'_>,
    ) -> Result<Bytes> {
        let n_blocks = self.n_tokens / self.layers[0][0].block_len();
        let side_header = |set: &StreamSet| SideHeader {
            head_dim: set.head_dim(),
            first: first_position,
            n_sinks: self.n_sinks_at(first_position),
            n_blocks,
            block_bytes: set.block_bytes(),
            n_tail: 0,
        };
        let layers = self.layers.iter().map(|[key, value]| {
            Some(LayerHeader {
                n_heads: key.streams().len(),
                dtype,
                model_dtypes: [dtype; 2],
                n_sinks: self.n_sinks,
                window: None,
                padding: None,
                key: side_header(key),
                value: side_header(value),
            })
        });
        let set = &self.layers[0][0];
        let header = Header {
            library_version: env!("CARGO_PKG_VERSION").to_owned(),
            model: origin.model.to_owned(),
            preset: set.id().ok_or(CacheError::Unnamed)?.digest,
            fingerprint: String::new(),
            weights: origin.weights.to_owned(),
            n_tokens: first_position + self.n_tokens,
            batch: 1,
            block_len: set.block_len(),
            has_token_ids: false,
            first_token_id: first_position,
            chunk_key: origin.chunk_key.to_owned(),
            compress_start_len: 0,
            uncompressed_tail: 0,
            record_past: false,
            layers: layers.collect(),
        };
        let layers = coded.iter().map(|sides| sides.each_ref().map(contents)).collect();
        Ok(to_bytes(&Contents { header, token_ids: None, layers })?)
    }

    fn held<E: Element>(&self, page: &Container, place: Place, first: usize) -> Result<ExportedSide<E>> {
        let set = &self.layers[place.layer][place.side as usize];
        let (heads, dim, n_sinks) = (set.streams().len(), set.head_dim(), self.n_sinks_at(first));
        let bytes = page.sinks(place);
        let (given, expected) = (bytes.len(), heads * n_sinks * dim * size_of::<E>());
        if given != expected {
            return Err(CacheError::Buffer { what: "sinks of a page", given, expected }.into());
        }
        // Copied, as bytes from afar begin anywhere.
        let mut numbers = bytes.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned::<E>);
        let exact = |n| Tensor::from_fn([1, heads, n, dim], || numbers.next().unwrap_or_default());
        let [sinks, tail] = [n_sinks, 0].map(exact);
        Ok(ExportedSide { first, sinks, blocks: vec![page.blocks(place, 0)], tail })
    }
}

fn contents<E: Element>(of: &ExportedSide<E>) -> SideContents<'_> {
    SideContents { sinks: bytemuck::cast_slice(of.sinks.data()), blocks: of.blocks.clone(), tail: &[] }
}
