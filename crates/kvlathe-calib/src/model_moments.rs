//! The moments of a whole model: layers × KV heads × {keys, values}.

use std::sync::Arc;

use kvlathe_codec::{Basis, LayerShape, Rope, Side, Storage};
use rayon::prelude::*;

use crate::design::{DesignOptions, Metric, design_shared, design_stream};
use crate::error::{CalibError, Result};
use crate::moments::{SharedMoments, StreamMoments, TurnBack};

/// What calibration must know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// One a layer; `None` for a layer that is not to be coded.
    pub layers: Vec<Option<CalibratedLayer>>,
}

/// What calibration must know of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibratedLayer {
    /// Sizes of its keys and values.
    pub shape: LayerShape,
    /// The rotation of keys.
    pub rope: Option<Arc<Rope>>,
}

impl CalibratedLayer {
    fn rope(&self, side: Side) -> Option<&Arc<Rope>> {
        self.rope.as_ref().filter(|_| side == Side::Key)
    }
}

/// One window of text at one layer and side: `[n_kv_heads, n_tokens, components]`, head-major, as the model has them
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
    /// The seed's U (`[key_dim, rank]` row-major) and mean for keys.
    pub key_shared: (Vec<f32>, Vec<f32>),
    /// The same for values.
    pub value_shared: (Vec<f32>, Vec<f32>),
}

/// Streaming moments of all streams of a model.
#[derive(Debug, Clone)]
pub struct ModelMoments {
    shape: ModelShape,
    /// `[layer][side]`, none of layers that are not coded.
    layers: Vec<Option<[SideMoments; 2]>>,
}

/// Of the keys or the values of a layer.
#[derive(Debug, Clone)]
struct SideMoments {
    /// One a KV head.
    streams: Vec<StreamMoments>,
    shared: SharedMoments,
}

impl ModelMoments {
    /// No text yet.
    #[must_use]
    pub fn new(shape: ModelShape) -> Self {
        let side = |shape: LayerShape, side: Side| SideMoments {
            streams: vec![StreamMoments::new(shape.dim(side)); shape.n_kv_heads],
            shared: SharedMoments::new(shape.dim(side)),
        };
        let both = |layer: &CalibratedLayer| Side::ALL.map(|each| side(layer.shape, each));
        Self { layers: shape.layers.iter().map(|layer| layer.as_ref().map(both)).collect(), shape }
    }

    /// The model's shape.
    #[must_use]
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Tokens seen (at the first layer that is coded).
    #[must_use]
    pub fn n_tokens(&self) -> u64 {
        self.layers.iter().flatten().next().map_or(0, |[keys, _]| keys.streams[0].n_tokens())
    }

    /// Adds one window of one layer and side.
    ///
    /// # Errors
    /// Wrong lengths or layer, NaN or infinity; then nothing was added.
    pub fn add(&mut self, window: Window<'_>) -> Result<()> {
        let known = self.check(window.layer, window.side, window.x)?;
        let shape = known.shape;
        let per_head = window.x.len() / shape.n_kv_heads;
        let n_tokens = per_head / shape.dim(window.side);
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
        let rope = known.rope(window.side);
        let turn_back = rope.map(|rope| TurnBack::new(rope, window.first_position, n_tokens));
        let moments = self.moments(window.layer, window.side);
        moments.streams.par_iter_mut().enumerate().try_for_each(|(head, moments)| {
            let range = head * per_head..(head + 1) * per_head;
            moments.add(&window.x[range.clone()], window.gradients.map(|g| &g[range]), turn_back.as_ref())
        })?;
        moments.shared.add(window.x);
        Ok(())
    }

    /// Adds queries `[n_kv_heads, n, key_dim]` (those of a group one after another, `n` = group · tokens).
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
        let CalibratedLayer { shape, rope } = self.check(layer, Side::Key, q)?;
        if n_tokens == 0 {
            return Err(CalibError::Length { what: "the tokens of queries", given: 0, expected: 1 });
        }
        let turn_back = rope.as_ref().map(|rope| TurnBack::new(rope, first_position, n_tokens));
        let (per_head, dim) = (q.len() / shape.n_kv_heads, shape.key_dim);
        let keys = self.moments(layer, Side::Key);
        for (head, moments) in keys.streams.iter_mut().enumerate() {
            for queries in q[head * per_head..(head + 1) * per_head].chunks(n_tokens * dim) {
                moments.add_queries(queries, turn_back.as_ref())?;
            }
        }
        Ok(())
    }

    /// Of a layer that has passed `check`.
    fn moments(&mut self, layer: usize, side: Side) -> &mut SideMoments {
        let layer = self.layers[layer].as_mut();
        &mut layer.expect("the layer has a shape, so it has moments")[side as usize]
    }

    /// The layer, if the vectors fit its shape.
    fn check(&self, layer: usize, side: Side, x: &[f32]) -> Result<CalibratedLayer> {
        let count = self.shape.layers.len();
        let Some(known) = self.shape.layers.get(layer).cloned().flatten() else {
            return Err(CalibError::Index { what: "coded layer", given: layer, count });
        };
        let whole = known.shape.n_kv_heads * known.shape.dim(side);
        if x.is_empty() || !x.len().is_multiple_of(whole) {
            let expected = (x.len() / whole).max(1) * whole;
            return Err(CalibError::Length { what: "the vectors of a window", given: x.len(), expected });
        }
        if x.iter().any(|v| !v.is_finite()) {
            return Err(CalibError::NonFinite { layer, what: "keys, values or queries" });
        }
        Ok(known)
    }

    /// Designs every layer that is coded from the accumulated gradients, with the seed's shared PCA of `shared_rank` beside.
    ///
    /// # Errors
    /// What [`design_stream`] and [`design_shared`] refuse.
    pub fn design(&self, options: &DesignOptions, shared_rank: usize) -> Result<Vec<Option<LayerDesign>>> {
        self.design_with(options, shared_rank, |_, _, _| Metric::Fisher)
    }

    /// As [`ModelMoments::design`] without gradients: queries for keys, and for values the given Gram matrices of the
    /// output projection, `[n_layers][n_kv_heads][value_dim²]`, none for layers that are not coded. `score_scale` is the factor on q·k.
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
    ) -> Result<Vec<Option<LayerDesign>>> {
        let layers = &self.shape.layers;
        if output_gram.len() != layers.len() {
            let (given, expected) = (output_gram.len(), layers.len());
            return Err(CalibError::Length { what: "the output Gram matrices", given, expected });
        }
        for (layer, (heads, known)) in output_gram.iter().zip(layers).enumerate() {
            let (n, d) =
                known.as_ref().map_or((0, 0), |known| (known.shape.n_kv_heads, known.shape.value_dim));
            if heads.len() != n || heads.iter().any(|g| g.len() != d * d) {
                let count = heads.len();
                return Err(CalibError::Index { what: "output Gram matrices of layer", given: layer, count });
            }
        }
        self.design_with(options, shared_rank, |layer, side, head| {
            let gram = &output_gram[layer][head];
            match (side, &self.layers[layer]) {
                (Side::Value, _) | (_, None) => Metric::Given(gram.clone()),
                (Side::Key, Some([_, values])) => {
                    let values = &values.streams[head];
                    let d = values.head_dim;
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
    ) -> Result<Vec<Option<LayerDesign>>> {
        let design = |layer: usize, known: &CalibratedLayer, [keys, values]: &[SideMoments; 2]| {
            let bases = |side: Side, moments: &SideMoments| -> Result<Vec<Basis>> {
                let rope = known.rope(side).map(Arc::as_ref);
                let streams = moments.streams.iter().enumerate();
                streams
                    .map(|(head, moments)| design_stream(moments, rope, &metric(layer, side, head), options))
                    .collect()
            };
            let shared = |moments: &SideMoments| -> Result<(Vec<f32>, Vec<f32>)> {
                let (_, u, mean) = design_shared(&moments.shared, shared_rank, Storage::Int8)?;
                Ok((u, mean))
            };
            Ok(LayerDesign {
                key: bases(Side::Key, keys)?,
                value: bases(Side::Value, values)?,
                key_shared: shared(keys)?,
                value_shared: shared(values)?,
            })
        };
        (0..self.layers.len())
            .into_par_iter()
            .map(|layer| match (&self.shape.layers[layer], &self.layers[layer]) {
                (Some(known), Some(moments)) => design(layer, known, moments).map(Some),
                _ => Ok(None),
            })
            .collect()
    }
}
