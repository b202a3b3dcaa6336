//! The moments of a whole model: layers × KV heads × {keys, values}.

use std::sync::Arc;

use kvlathe_codec::{Basis, Rope, Storage};
use rayon::prelude::*;

use crate::design::{DesignOptions, Metric, design_shared, design_stream};
use crate::error::{CalibError, Result};
use crate::moments::{SharedMoments, StreamMoments, TurnBack};

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys: rotated by RoPE where the layer has one.
    Key,
    /// Values: never rotated.
    Value,
}

/// What calibration must know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Layers.
    pub n_layers: usize,
    /// KV heads of a layer.
    pub n_kv_heads: usize,
    /// Components of a key or value.
    pub head_dim: usize,
    /// The rotation of each layer's keys, `[n_layers]`.
    pub ropes: Vec<Option<Arc<Rope>>>,
}

/// One window of text at one layer and side: `[n_kv_heads, n_tokens, head_dim]`, head-major, as the model has them
/// (keys rotated).
#[derive(Debug, Clone, Copy)]
pub struct Window<'a> {
    /// Layer.
    pub layer: usize,
    /// Keys or values.
    pub side: Side,
    /// Position of the first token.
    pub first_position: usize,
    /// The vectors.
    pub x: &'a [f32],
    /// Gradients of the summed log-likelihood with respect to `x`, as read by queries from the compressed part.
    pub gradients: Option<&'a [f32]>,
}

/// The designed bases of one layer.
#[derive(Debug, Clone)]
pub struct LayerDesign {
    /// One a KV head.
    pub key: Vec<Basis>,
    /// One a KV head.
    pub value: Vec<Basis>,
    /// The seed's U (`[head_dim, rank]` row-major) and mean for keys.
    pub key_shared: (Vec<f32>, Vec<f32>),
    /// The same for values.
    pub value_shared: (Vec<f32>, Vec<f32>),
}

/// Streaming moments of all streams of a model.
#[derive(Debug, Clone)]
pub struct ModelMoments {
    shape: ModelShape,
    /// `[layer][side][head]`.
    streams: Vec<[Vec<StreamMoments>; 2]>,
    /// `[layer][side]`.
    shared: Vec<[SharedMoments; 2]>,
}

impl ModelMoments {
    /// No text yet.
    ///
    /// # Errors
    /// A number of ropes other than of layers.
    pub fn new(shape: ModelShape) -> Result<Self> {
        if shape.ropes.len() != shape.n_layers {
            return Err(CalibError::Length {
                what: "ropes",
                given: shape.ropes.len(),
                expected: shape.n_layers,
            });
        }
        let heads = || vec![StreamMoments::new(shape.head_dim); shape.n_kv_heads];
        Ok(Self {
            streams: (0..shape.n_layers).map(|_| [heads(), heads()]).collect(),
            shared: vec![
                [SharedMoments::new(shape.head_dim), SharedMoments::new(shape.head_dim)];
                shape.n_layers
            ],
            shape,
        })
    }

    /// The model's shape.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Tokens seen (at layer 0).
    #[must_use]
    pub fn n_tokens(&self) -> u64 {
        self.streams.first().map_or(0, |layer| layer[0][0].n_tokens())
    }

    /// Adds one window of one layer and side.
    ///
    /// # Errors
    /// Wrong lengths or layer, NaN or infinity; then nothing was added.
    pub fn add(&mut self, window: Window<'_>) -> Result<()> {
        let ModelShape { n_kv_heads, head_dim, .. } = self.shape;
        self.check(window.layer, window.x)?;
        let per_head = window.x.len() / n_kv_heads;
        let n_tokens = per_head / head_dim;
        if let Some(g) = window.gradients {
            if g.len() != window.x.len() {
                return Err(CalibError::Length {
                    what: "the gradients",
                    given: g.len(),
                    expected: window.x.len(),
                });
            }
            if g.iter().any(|v| !v.is_finite()) {
                return Err(CalibError::NonFinite { layer: window.layer, what: "gradients" });
            }
        }
        let turn_back = self.turn_back(window.layer, window.side, window.first_position, n_tokens);
        let streams = &mut self.streams[window.layer][window.side as usize];
        streams.par_iter_mut().enumerate().try_for_each(|(head, moments)| {
            let range = head * per_head..(head + 1) * per_head;
            moments.add(&window.x[range.clone()], window.gradients.map(|g| &g[range]), turn_back.as_ref())
        })?;
        self.shared[window.layer][window.side as usize].add(window.x);
        Ok(())
    }

    /// Adds queries `[n_kv_heads, n, head_dim]` (those of a group one after another, `n` = group · tokens).
    ///
    /// # Errors
    /// Wrong lengths or layer, NaN or infinity.
    pub fn add_queries(
        &mut self,
        layer: usize,
        first_position: usize,
        n_tokens: usize,
        q: &[f32],
    ) -> Result<()> {
        let ModelShape { n_kv_heads, head_dim, .. } = self.shape;
        self.check(layer, q)?;
        if n_tokens == 0 {
            return Err(CalibError::Length { what: "the tokens of queries", given: 0, expected: 1 });
        }
        let turn_back = self.turn_back(layer, Side::Key, first_position, n_tokens);
        let per_head = q.len() / n_kv_heads;
        for (head, moments) in self.streams[layer][Side::Key as usize].iter_mut().enumerate() {
            for queries in q[head * per_head..(head + 1) * per_head].chunks(n_tokens * head_dim) {
                moments.add_queries(queries, turn_back.as_ref())?;
            }
        }
        Ok(())
    }

    fn turn_back(
        &self,
        layer: usize,
        side: Side,
        first_position: usize,
        n_tokens: usize,
    ) -> Option<TurnBack> {
        match side {
            Side::Key => {
                self.shape.ropes[layer].as_ref().map(|rope| TurnBack::new(rope, first_position, n_tokens))
            }
            Side::Value => None,
        }
    }

    fn check(&self, layer: usize, x: &[f32]) -> Result<()> {
        let ModelShape { n_layers, n_kv_heads, head_dim, .. } = self.shape;
        if layer >= n_layers {
            return Err(CalibError::Index { what: "layer", given: layer, count: n_layers });
        }
        let whole = n_kv_heads * head_dim;
        if x.is_empty() || !x.len().is_multiple_of(whole) {
            let expected = (x.len() / whole).max(1) * whole;
            return Err(CalibError::Length { what: "the vectors of a window", given: x.len(), expected });
        }
        if x.iter().any(|v| !v.is_finite()) {
            return Err(CalibError::NonFinite { layer, what: "keys, values or queries" });
        }
        Ok(())
    }

    /// Designs every layer from the accumulated gradients, with the seed's shared PCA of `shared_rank` beside.
    ///
    /// # Errors
    /// What [`design_stream`] and [`design_shared`] refuse.
    pub fn design(&self, options: &DesignOptions, shared_rank: usize) -> Result<Vec<LayerDesign>> {
        self.design_with(options, shared_rank, |_, _, _| Metric::Fisher)
    }

    /// As [`ModelMoments::design`] without gradients: queries for keys, and for values the given Gram matrices of the
    /// output projection, `[n_layers][n_kv_heads][head_dim²]`. `score_scale` is the factor on q·k.
    ///
    /// A score's error moves the output by the spread of the values it mixes, so a head's key metric is weighed with
    /// tr(G·E[v vᵀ]).
    ///
    /// # Errors
    /// What [`design_stream`] and [`design_shared`] refuse.
    pub fn design_without_gradients(
        &self,
        options: &DesignOptions,
        shared_rank: usize,
        output_gram: &[Vec<Vec<f64>>],
        score_scale: f64,
    ) -> Result<Vec<LayerDesign>> {
        let d = self.shape.head_dim;
        for (layer, heads) in output_gram.iter().enumerate() {
            if heads.len() != self.shape.n_kv_heads || heads.iter().any(|g| g.len() != d * d) {
                return Err(CalibError::Index {
                    what: "output Gram matrices of layer",
                    given: layer,
                    count: heads.len(),
                });
            }
        }
        if output_gram.len() != self.shape.n_layers {
            let (given, expected) = (output_gram.len(), self.shape.n_layers);
            return Err(CalibError::Length { what: "the output Gram matrices", given, expected });
        }
        self.design_with(options, shared_rank, |layer, side, head| {
            let gram = &output_gram[layer][head];
            match side {
                Side::Value => Metric::Given(gram.clone()),
                Side::Key => {
                    let values = &self.streams[layer][Side::Value as usize][head];
                    let spread = values.gain_squared_sum / values.n_tokens.max(1) as f64;
                    let trace: f64 = (0..d).map(|i| gram[i * d + i]).sum();
                    Metric::Queries { weight: score_scale * score_scale * trace * spread }
                }
            }
        })
    }

    fn design_with(
        &self,
        options: &DesignOptions,
        shared_rank: usize,
        metric: impl Fn(usize, Side, usize) -> Metric + Sync,
    ) -> Result<Vec<LayerDesign>> {
        let side_design = |layer: usize, side: Side| -> Result<Vec<Basis>> {
            let rope = match side {
                Side::Key => self.shape.ropes[layer].as_deref(),
                Side::Value => None,
            };
            self.streams[layer][side as usize]
                .iter()
                .enumerate()
                .map(|(head, moments)| design_stream(moments, rope, &metric(layer, side, head), options))
                .collect()
        };
        (0..self.shape.n_layers)
            .into_par_iter()
            .map(|layer| {
                let shared = |side: Side| -> Result<(Vec<f32>, Vec<f32>)> {
                    let (_, u, mean) =
                        design_shared(&self.shared[layer][side as usize], shared_rank, Storage::Int8)?;
                    Ok((u, mean))
                };
                Ok(LayerDesign {
                    key: side_design(layer, Side::Key)?,
                    value: side_design(layer, Side::Value)?,
                    key_shared: shared(Side::Key)?,
                    value_shared: shared(Side::Value)?,
                })
            })
            .collect()
    }
}
