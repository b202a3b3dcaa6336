//! Moments as a Python object: calibration's accumulator.

use std::sync::Arc;

use kvlathe::cache::with_threads;
use kvlathe::calib::{DesignOptions, ModelMoments, ModelShape, Side, Window};
use kvlathe::codec::{Pairing, Rope};
use pyo3::prelude::*;

use crate::error::{exception, to_python};
use crate::preset::{Preset, meta_from_json};
use crate::tensor::RawTensor;

/// A layer's rotation as Python describes it: ("half_split" or "interleaved", rotary_dim, inv_freq).
type RopeTuple = (String, usize, Vec<f64>);

/// Streaming second moments of a model's keys, values and gradients.
#[pyclass(module = "kvlathe._native")]
pub(crate) struct Moments(ModelMoments);

fn rope((pairing, rotary_dim, inv_freq): RopeTuple) -> PyResult<Arc<Rope>> {
    let pairing = match pairing.as_str() {
        "half_split" => Pairing::HalfSplit,
        "interleaved" => Pairing::Interleaved,
        other => {
            let message = format!("pairing {other:?}, expected \"half_split\" or \"interleaved\"");
            return Err(exception("PresetError", message));
        }
    };
    Rope::new(pairing, rotary_dim, inv_freq).map(Arc::new).map_err(to_python)
}

fn side(name: &str) -> PyResult<Side> {
    match name {
        "key" => Ok(Side::Key),
        "value" => Ok(Side::Value),
        other => Err(exception("ShapeError", format!("side {other:?}, expected \"key\" or \"value\""))),
    }
}

fn float32<'a>(tensor: &'a RawTensor, what: &str) -> PyResult<&'a [f32]> {
    tensor.expect_dtype(what, "float32")?;
    // SAFETY: the dtype is checked, the tensor is an argument of the running call, which only reads it.
    unsafe { tensor.contiguous::<f32>(what) }
}

#[pymethods]
impl Moments {
    /// `ropes`: one entry a layer, None where keys are not rotated.
    #[new]
    fn new(n_kv_heads: usize, head_dim: usize, ropes: Vec<Option<RopeTuple>>) -> PyResult<Self> {
        if n_kv_heads == 0 || head_dim == 0 || ropes.is_empty() {
            return Err(exception(
                "ShapeError",
                "a model has at least one layer, KV head and component".into(),
            ));
        }
        let ropes = ropes.into_iter().map(|r| r.map(rope).transpose()).collect::<PyResult<Vec<_>>>()?;
        let shape = ModelShape { n_layers: ropes.len(), n_kv_heads, head_dim, ropes };
        ModelMoments::new(shape).map(Self).map_err(to_python)
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
    /// Without gradients, `output_gram` gives the output projections' Gram matrices `[n_layers][n_kv_heads][d·d]`.
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
        kvlathe::preset_from_design(meta, self.0.shape(), designs).map(Preset).map_err(to_python)
    }
}

/// Runs `work` in the library's threads without the GIL.
fn in_pool<R: Send>(py: Python<'_>, n_threads: usize, work: impl FnOnce() -> R + Send) -> PyResult<R> {
    py.detach(|| with_threads(n_threads, work)).map_err(to_python)
}
