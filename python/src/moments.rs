//! Moments as a Python object: calibration's accumulator.

use std::sync::Arc;

use kvlathe::cache::with_threads;
use kvlathe::calib::{CalibratedLayer, DesignOptions, ModelMoments, ModelShape, Window};
use kvlathe::codec::{LayerShape, ParseNameError, Rope};
use pyo3::prelude::*;

use crate::error::{exception, to_python};
use crate::preset::{Preset, meta_from_json, side};
use crate::tensor::RawTensor;

/// A layer's rotation as Python describes it: ("half_split" or "interleaved", rotary_dim, inv_freq).
type RopeTuple = (String, usize, Vec<f64>);

/// A layer as Python describes it: KV heads, components of a key, of a value, rotation.
type LayerTuple = (usize, usize, usize, Option<RopeTuple>);

fn layer((n_kv_heads, key_dim, value_dim, rotation): LayerTuple) -> PyResult<CalibratedLayer> {
    if n_kv_heads == 0 || key_dim == 0 || value_dim == 0 {
        return Err(exception("ShapeError", "a layer has at least one KV head and component".into()));
    }
    let shape = LayerShape { n_kv_heads, key_dim, value_dim };
    Ok(CalibratedLayer { shape, rope: rotation.map(rope).transpose()? })
}

/// Streaming second moments of a model's keys, values and gradients.
#[pyclass(module = "kvlathe._native")]
pub(crate) struct Moments(ModelMoments);

fn rope((pairing, rotary_dim, inv_freq): RopeTuple) -> PyResult<Arc<Rope>> {
    let pairing =
        pairing.parse().map_err(|error: ParseNameError| exception("PresetError", error.to_string()))?;
    Rope::new(pairing, rotary_dim, inv_freq).map(Arc::new).map_err(to_python)
}

fn float32<'a>(tensor: &'a RawTensor, what: &str) -> PyResult<&'a [f32]> {
    tensor.expect_dtype(what, "float32")?;
    // SAFETY: the dtype is checked, the tensor is an argument of the running call, which only reads it.
    unsafe { tensor.contiguous::<f32>(what) }
}

#[pymethods]
impl Moments {
    /// One entry a layer: KV heads, components of a key and of a value, and the rotation of keys if they are rotated;
    /// None for a layer that is not coded.
    #[new]
    fn new(layers: Vec<Option<LayerTuple>>) -> PyResult<Self> {
        let layers = layers.into_iter().map(|l| l.map(layer).transpose()).collect::<PyResult<Vec<_>>>()?;
        if layers.iter().all(Option::is_none) {
            return Err(exception("ShapeError", "a model has at least one layer that can be coded".into()));
        }
        Ok(Self(ModelMoments::new(ModelShape { layers })))
    }

    /// Tokens seen.
    #[getter]
    fn n_tokens(&self) -> u64 {
        self.0.n_tokens()
    }

    /// Adds `[n_kv_heads, n_tokens, head_dim]` float32 vectors of one layer and side, with gradients of that shape.
    #[pyo3(signature = (layer, side_name, x, gradients, first_position, n_threads))]
    #[expect(clippy::too_many_arguments, reason = "one call, each argument a different thing")]
    fn add(
        &mut self,
        py: Python<'_>,
        layer: usize,
        side_name: &str,
        x: &Bound<'_, PyAny>,
        gradients: Option<&Bound<'_, PyAny>>,
        first_position: usize,
        n_threads: usize,
    ) -> PyResult<()> {
        let x = RawTensor::new(x, "vectors", 3)?;
        let gradients = gradients.map(|g| RawTensor::new(g, "gradients", 3)).transpose()?;
        let window = Window {
            layer,
            side: side(side_name)?,
            first_position,
            x: float32(&x, "vectors")?,
            gradients: gradients.as_ref().map(|g| float32(g, "gradients")).transpose()?,
        };
        let moments = &mut self.0;
        in_pool(py, n_threads, || moments.add(window))?.map_err(to_python)
    }

    /// Adds `[n_kv_heads, group · n_tokens, head_dim]` float32 queries of one layer.
    fn add_queries(
        &mut self,
        layer: usize,
        first_position: usize,
        n_tokens: usize,
        q: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let q = RawTensor::new(q, "queries", 3)?;
        self.0.add_queries(layer, first_position, n_tokens, float32(&q, "queries")?).map_err(to_python)
    }

    /// Designs a preset without bits: `Preset.with_bits` allocates them. `meta_json` is the preset's top level.
    ///
    /// Without gradients, `output_gram` gives the output projections' Gram matrices `[n_layers][n_kv_heads][d·d]`, of layers
    /// that are not coded an empty list.
    #[pyo3(signature = (meta_json, *, block_len, shrinkage, shared_rank, n_threads, output_gram=None, score_scale=1.0))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn design(
        &self,
        py: Python<'_>,
        meta_json: &str,
        block_len: usize,
        shrinkage: f64,
        shared_rank: usize,
        n_threads: usize,
        output_gram: Option<Vec<Vec<Vec<f64>>>>,
        score_scale: f64,
    ) -> PyResult<Preset> {
        let meta = meta_from_json(meta_json)?;
        let options = DesignOptions { block_len, shrinkage };
        let designs = in_pool(py, n_threads, || match &output_gram {
            None => self.0.design(&options, shared_rank),
            Some(gram) => self.0.design_without_gradients(&options, shared_rank, gram, score_scale),
        })?
        .map_err(to_python)?;
        kvlathe::preset_from_design(meta, self.0.shape(), designs).map(Preset::from).map_err(to_python)
    }
}

/// Runs `work` in the library's threads without the GIL.
fn in_pool<R: Send>(py: Python<'_>, n_threads: usize, work: impl FnOnce() -> R + Send) -> PyResult<R> {
    py.detach(|| with_threads(n_threads, work)).map_err(to_python)
}
