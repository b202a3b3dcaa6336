//! One layer's cache as a Python object.

use std::num::NonZeroUsize;
use std::sync::RwLock;

use half::{bf16, f16};
use kvlathe::cache::{AttentionOptions, Block, CacheError, Coding, LayerCache, Policy, SideParts};
use kvlathe::codec::{Element, Side};
use pyo3::prelude::*;

use crate::block::PackedRow;
use crate::codec::StreamSetCodec;
use crate::error::{exception, to_python};
use crate::preset::side;
use crate::tensor::{Dtype, RawTensor};

/// A layer's cache in the model's number format.
enum AnyLayer {
    F32(RwLock<LayerCache<f32>>),
    Bf16(RwLock<LayerCache<bf16>>),
    F16(RwLock<LayerCache<f16>>),
}

/// Runs `$body` with `$layer` bound to the lock of the typed cache and `$element` to its element type.
macro_rules! with_layer {
    ($any:expr, $layer:ident, $element:ident => $body:expr) => {
        match $any {
            AnyLayer::F32($layer) => {
                #[allow(dead_code, reason = "not every body names the type")]
                type $element = f32;
                $body
            }
            AnyLayer::Bf16($layer) => {
                #[allow(dead_code, reason = "not every body names the type")]
                type $element = bf16;
                $body
            }
            AnyLayer::F16($layer) => {
                #[allow(dead_code, reason = "not every body names the type")]
                type $element = f16;
                $body
            }
        }
    };
}

/// Sinks, packed blocks and tail of one layer. Calls from several threads wait for one another.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct NativeLayer {
    layer: AnyLayer,
    dtype: Dtype,
}

/// A call has panicked while it changed the layer.
fn poisoned() -> PyErr {
    let message = "an earlier call on this cache broke off in the middle; call reset(), and please report it";
    exception("CacheStateError", message.into())
}

/// Looks at a layer. A lock that is taken is waited for without the GIL.
fn look<E: Element, R: Send>(
    py: Python<'_>,
    layer: &RwLock<LayerCache<E>>,
    look: impl FnOnce(&LayerCache<E>) -> R + Send,
) -> PyResult<R> {
    // Mostly free, and then not worth letting the GIL go for a number.
    if let Ok(layer) = layer.try_read() {
        return Ok(look(&layer));
    }
    py.detach(|| layer.read().ok().map(|layer| look(&layer))).ok_or_else(poisoned)
}

/// Reads from a layer without the GIL.
fn read<E: Element>(
    py: Python<'_>,
    layer: &RwLock<LayerCache<E>>,
    read: impl FnOnce(&LayerCache<E>) -> Result<(), CacheError> + Send,
) -> PyResult<()> {
    let done = py.detach(|| layer.read().ok().map(|layer| read(&layer)));
    done.ok_or_else(poisoned)?.map_err(to_python)
}

/// As [`read`], of a layer that holds `n_tokens`; somebody else has changed it since the caller looked, if it does not.
fn read_of<E: Element>(
    py: Python<'_>,
    layer: &RwLock<LayerCache<E>>,
    n_tokens: usize,
    work: impl FnOnce(&LayerCache<E>) -> Result<(), CacheError> + Send,
) -> PyResult<()> {
    let mut held = n_tokens;
    read(py, layer, |layer| {
        held = layer.n_tokens();
        if held == n_tokens { work(layer) } else { Ok(()) }
    })?;
    if held == n_tokens {
        return Ok(());
    }
    let message = format!(
        "this layer holds {held} tokens, {n_tokens} when the call began: another thread uses the same cache; give each thread a cache of its own"
    );
    Err(exception("CacheStateError", message))
}

/// Changes a layer without the GIL.
fn change<E: Element>(
    py: Python<'_>,
    layer: &RwLock<LayerCache<E>>,
    change: impl FnOnce(&mut LayerCache<E>) -> Result<(), CacheError> + Send,
) -> PyResult<()> {
    let done = py.detach(|| layer.write().ok().map(|mut layer| change(&mut layer)));
    done.ok_or_else(poisoned)?.map_err(to_python)
}

fn coding(codec: &Bound<'_, PyAny>) -> PyResult<Coding> {
    if codec.is_none() {
        Ok(Coding::Exact)
    } else if let Ok(set) = codec.cast::<StreamSetCodec>() {
        Ok(Coding::Blocks(set.get().0.clone()))
    } else {
        let message = format!("{} is no native codec", codec.get_type().name()?);
        Err(exception("PresetError", message))
    }
}

/// One side's parts as Python has them: first position, sinks, blocks of each row, tail.
type Parts<'py> = (usize, Bound<'py, PyAny>, Vec<Bound<'py, PackedRow>>, Bound<'py, PyAny>);

/// # Safety
/// As [`RawTensor::view`].
unsafe fn side_parts<'a, E: Element>(
    (first, sinks, blocks, tail): &'a (usize, RawTensor<'_>, Vec<Vec<Block>>, RawTensor<'_>),
) -> PyResult<SideParts<'a, E>> {
    // SAFETY: the caller's promise.
    let (sinks, tail) = unsafe { (sinks.view()?, tail.view()?) };
    Ok(SideParts { first: *first, sinks, blocks, tail })
}

impl NativeLayer {
    fn tensor<'py>(&self, tensor: &Bound<'py, PyAny>, what: &str) -> PyResult<RawTensor<'py>> {
        let raw = RawTensor::new(tensor, what, 4)?;
        if raw.dtype()? != self.dtype {
            let message = format!(
                "{what} are of another dtype than this cache holds ({:?}); call reset() first",
                self.dtype
            );
            return Err(exception("DtypeError", message));
        }
        Ok(raw)
    }
}

#[pymethods]
impl NativeLayer {
    /// Codecs are None (exact) or a StreamSetCodec; `dims` are the head_dim of keys and of values, `window` the tokens
    /// that a query sees, its own included, or None for all.
    #[new]
    #[pyo3(signature = (key, value, *, n_sinks, compress_start_len, n_tail, window, dtype, batch, n_heads, dims))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python, called from one place")]
    fn new(
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        n_sinks: usize,
        compress_start_len: usize,
        n_tail: usize,
        window: Option<NonZeroUsize>,
        dtype: &str,
        batch: usize,
        n_heads: usize,
        dims: (usize, usize),
    ) -> PyResult<Self> {
        let (key, value) = (coding(key)?, coding(value)?);
        let policy = Policy { n_sinks, compress_start_len, n_tail, window };
        let dtype = Dtype::from_name(dtype)?;
        macro_rules! new {
            ($variant:ident) => {
                LayerCache::new(key, value, policy, batch, n_heads, dims)
                    .map(|layer| AnyLayer::$variant(RwLock::new(layer)))
            };
        }
        let layer = match dtype {
            Dtype::F32 => new!(F32),
            Dtype::Bf16 => new!(Bf16),
            Dtype::F16 => new!(F16),
        };
        Ok(Self { layer: layer.map_err(to_python)?, dtype })
    }

    /// Sequences.
    #[getter]
    fn batch(&self, py: Python<'_>) -> PyResult<usize> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::batch))
    }

    /// Tokens of each sequence.
    #[getter]
    fn n_tokens(&self, py: Python<'_>) -> PyResult<usize> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::n_tokens))
    }

    /// Position from which on both sides are held.
    #[getter]
    fn first(&self, py: Python<'_>) -> PyResult<usize> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::first))
    }

    /// Tokens held in coded form.
    #[getter]
    fn n_coded(&self, py: Python<'_>) -> PyResult<usize> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::n_coded))
    }

    /// Appends `[batch, heads, tokens, head_dim]` keys and values.
    fn append(&self, py: Python<'_>, keys: &Bound<'_, PyAny>, values: &Bound<'_, PyAny>) -> PyResult<()> {
        let (keys, values) = (self.tensor(keys, "keys")?, self.tensor(values, "values")?);
        with_layer!(&self.layer, layer, E => {
            // SAFETY: dtypes were checked; both tensors are arguments of this call and so alive until it returns.
            let (keys, values) = unsafe { (keys.view::<E>()?, values.view::<E>()?) };
            // A copy: waking other threads would take longer.
            change(py, layer, |layer| layer.append(keys, values))
        })
    }

    /// Codes the whole blocks that have left the tail. Drops nothing.
    fn compress(&self, py: Python<'_>, n_threads: usize) -> PyResult<()> {
        with_layer!(&self.layer, layer, E => {
            // Most steps have nothing to code: not worth waking threads.
            if !look(py, layer, LayerCache::is_due)? {
                return Ok(());
            }
            change(py, layer, |layer| layer.compress(n_threads))
        })
    }

    /// Whether `settle` would code or drop anything.
    fn would_settle(&self, py: Python<'_>) -> PyResult<bool> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::would_settle))
    }

    /// Drops what has left the sliding window, then codes as `compress` does; both or neither.
    fn settle(&self, py: Python<'_>, n_threads: usize) -> PyResult<()> {
        with_layer!(&self.layer, layer, E => {
            if !look(py, layer, LayerCache::would_settle)? {
                return Ok(());
            }
            change(py, layer, |layer| layer.settle(n_threads))
        })
    }

    /// Writes the tokens from `first` on, to the `end`-th, to the front of two contiguous tensors
    /// `[batch, heads, ≥ end − first, head_dim]`. Refuses to, if the layer does not hold `n_tokens`.
    #[pyo3(signature = (keys, values, *, tokens, n_tokens, n_threads))]
    fn read(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        values: &Bound<'_, PyAny>,
        tokens: (usize, usize),
        n_tokens: usize,
        n_threads: usize,
    ) -> PyResult<()> {
        let (keys, values) = (self.tensor(keys, "keys")?, self.tensor(values, "values")?);
        let (key_tokens, value_tokens) = (keys.shape[2], values.shape[2]);
        let tokens = tokens.0..tokens.1;
        with_layer!(&self.layer, layer, E => {
            // SAFETY: as in `append`; the caller made both tensors for this call, nothing else refers to them yet.
            let (keys, values) = unsafe { (keys.slice_mut::<E>("keys")?, values.slice_mut::<E>("values")?) };
            read_of(py, layer, n_tokens, |layer| {
                layer.read(Side::Key, tokens.clone(), keys, key_tokens, n_threads)?;
                layer.read(Side::Value, tokens, values, value_tokens, n_threads)
            })
        })
    }

    /// Whether `attend` can serve this layer.
    #[getter]
    fn can_attend(&self, py: Python<'_>) -> PyResult<bool> {
        with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::can_attend))
    }

    /// Attention of `[batch, query heads, q, head_dim]` queries over all tokens, or those of each query's window, straight
    /// from the blocks, into the contiguous `out` `[batch, q, query heads, head_dim]` and, of each query the log of its
    /// softmax's sum, `lse` `[batch, query heads, q]` in float32. `mask` is uint8
    /// `[1 or batch, q, tokens]`, nonzero = seen, its tokens the last ones, those that any query sees; without it
    /// attention is causal, the last query at the last token. Refuses to, if the layer does not hold `n_tokens`:
    /// somebody else has changed it since the caller's tokens came in.
    #[pyo3(signature = (queries, out, lse, *, n_tokens, mask, scaling, softcap, sink_scores, n_threads))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn attend(
        &self,
        py: Python<'_>,
        queries: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        lse: &Bound<'_, PyAny>,
        n_tokens: usize,
        mask: Option<&Bound<'_, PyAny>>,
        scaling: f32,
        softcap: Option<f32>,
        sink_scores: Option<Vec<f32>>,
        n_threads: usize,
    ) -> PyResult<()> {
        let (queries, out) = (self.tensor(queries, "queries")?, self.tensor(out, "the attention output")?);
        let mask = mask.map(|m| RawTensor::new(m, "the attention mask", 3)).transpose()?;
        let mask = match &mask {
            None => None,
            Some(mask) => {
                mask.expect_dtype("the attention mask", "uint8")?;
                // SAFETY: the dtype is checked; the tensor is an argument of this call, which only reads it.
                Some(unsafe { mask.contiguous::<u8>("the attention mask")? })
            }
        };
        let sink_scores = sink_scores.as_deref();
        let options = AttentionOptions { scaling, mask, softcap, sink_scores };
        let lse = RawTensor::new(lse, "the log-sum-exp", 3)?;
        lse.expect_dtype("the log-sum-exp", "float32")?;
        with_layer!(&self.layer, layer, E => {
            // SAFETY: as in `append` and `read`.
            let (queries, out) = unsafe { (queries.view::<E>()?, out.slice_mut::<E>("the attention output")?) };
            // SAFETY: the dtype is checked; the caller made the tensor for this call.
            let lse = unsafe { lse.slice_mut::<f32>("the log-sum-exp")? };
            read_of(py, layer, n_tokens, |layer| layer.attend(queries, options, out, Some(lse), n_threads))
        })
    }

    /// Drops what has left the sliding window.
    fn forget(&self, py: Python<'_>) -> PyResult<()> {
        with_layer!(&self.layer, layer, E => change(py, layer, |layer| {
            layer.forget();
            Ok(())
        }))
    }

    /// Removes the newest tokens.
    fn crop(&self, py: Python<'_>, n_tokens: usize) -> PyResult<()> {
        with_layer!(&self.layer, layer, E => change(py, layer, |layer| layer.crop(n_tokens)))
    }

    /// Replaces the batch by these rows, in this order.
    fn select(&self, py: Python<'_>, rows: Vec<usize>) -> PyResult<()> {
        with_layer!(&self.layer, layer, E => change(py, layer, |layer| layer.select(&rows)))
    }

    /// Bytes held: exact, coded, and those of the coded ones that are somebody else's.
    fn memory_use(&self, py: Python<'_>) -> PyResult<(usize, usize, usize)> {
        let memory = with_layer!(&self.layer, layer, E => look(py, layer, LayerCache::memory_use))?;
        Ok((memory.exact_bytes, memory.coded_bytes, memory.foreign_bytes))
    }

    /// Where a side keeps its tokens: positions of the first one held, of the first coded one, of the tail's first.
    fn positions(&self, py: Python<'_>, side_name: &str) -> PyResult<(usize, usize, usize)> {
        let side = side(side_name)?;
        let found = with_layer!(&self.layer, layer, E => look(py, layer, |layer| layer.positions(side)))?;
        Ok((found.first, found.coded_at, found.tail_at))
    }

    /// The packed blocks of one side of a row, oldest first, sharing their bytes with the layer.
    fn export(&self, py: Python<'_>, row: usize, side_name: &str) -> PyResult<PackedRow> {
        let side = side(side_name)?;
        let blocks = with_layer!(&self.layer, layer, E => look(py, layer, |layer| layer.export(row, side)))?;
        Ok(PackedRow(blocks.map_err(to_python)?))
    }

    /// Fills an empty layer. Of keys and of values: position of the first token, sinks `[batch, heads, n, head_dim]`, each
    /// row's blocks, tail `[batch, heads, n, head_dim]`.
    fn import_parts(&self, py: Python<'_>, keys: Parts<'_>, values: Parts<'_>) -> PyResult<()> {
        let [keys, values] = [keys, values].map(|parts| {
            let (sinks, tail) = (self.tensor(&parts.1, "sinks")?, self.tensor(&parts.3, "the tail")?);
            let blocks: Vec<Vec<Block>> = parts.2.iter().map(|row| row.get().0.clone()).collect();
            Ok::<_, PyErr>((parts.0, sinks, blocks, tail))
        });
        let (keys, values) = (keys?, values?);
        with_layer!(&self.layer, layer, E => {
            // SAFETY: as in `append`.
            let (keys, values) = unsafe { (side_parts::<E>(&keys)?, side_parts::<E>(&values)?) };
            change(py, layer, |layer| layer.import(keys, values))
        })
    }

    /// A copy that shares the packed blocks.
    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        macro_rules! copied {
            ($layer:ident, $variant:ident) => {
                look(py, $layer, LayerCache::try_clone)?.map(|twin| AnyLayer::$variant(RwLock::new(twin)))
            };
        }
        let layer = match &self.layer {
            AnyLayer::F32(layer) => copied!(layer, F32),
            AnyLayer::Bf16(layer) => copied!(layer, Bf16),
            AnyLayer::F16(layer) => copied!(layer, F16),
        };
        Ok(Self { layer: layer.map_err(to_python)?, dtype: self.dtype })
    }
}
