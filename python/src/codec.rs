//! The codecs as Python objects: immutable, shared by caches, and usable by themselves on tensors.

use std::sync::Arc;

use kvlathe::cache::{CacheError, Coding, TensorView};
use kvlathe::codec::{Element, LowRank, Scratch, Storage, StreamSet, Tokens, best_isa};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{exception, to_python};
use crate::tensor::{RawTensor, with_element};

/// The design's codec for all KV heads of one layer's keys or values.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct StreamSetCodec(pub(crate) Arc<StreamSet>);

fn bytes_of<'py>(py: Python<'py>, values: &[f32]) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    PyBytes::new(py, &bytes)
}

impl StreamSetCodec {
    fn check_blocks(&self, shape: &[usize]) -> PyResult<()> {
        let set = &self.0;
        let (heads, d, len) = (set.streams().len(), set.head_dim(), set.block_len());
        if shape[1] != heads || shape[3] != d || !shape[2].is_multiple_of(len) {
            return Err(exception(
                "ShapeError",
                format!(
                    "tensor of shape {shape:?}, expected [batch, {heads}, a multiple of {len} tokens, {d}]"
                ),
            ));
        }
        Ok(())
    }

    fn check_packed(&self, packed: &RawTensor, tokens: &RawTensor) -> PyResult<()> {
        packed.expect_dtype("packed blocks", "uint8")?;
        let expected = [tokens.shape[0], tokens.shape[2] / self.0.block_len(), self.0.block_bytes()];
        if packed.shape != expected {
            let message = format!("packed blocks of shape {:?}, expected {expected:?}", packed.shape);
            return Err(exception("ShapeError", message));
        }
        Ok(())
    }
}

fn encode_all<E: Element>(
    set: &StreamSet,
    view: &TensorView<'_, E>,
    position: usize,
    packed: &mut [u8],
) -> Result<(), CacheError> {
    let (len, bytes) = (set.block_len(), set.block_bytes());
    let n_blocks = view.n_tokens() / len;
    let mut scratch = Scratch::default();
    let mut tokens = vec![E::default(); len * set.head_dim()];
    for (at, block) in packed.chunks_exact_mut(bytes).enumerate() {
        let (row, first) = (at / n_blocks, at % n_blocks * len);
        let frame = set.frame(position + first);
        for (head, stream) in set.streams().iter().enumerate() {
            for (t, token) in tokens.chunks_exact_mut(set.head_dim()).enumerate() {
                token.copy_from_slice(view.token(row, head, first + t));
            }
            let tokens = Tokens { data: &tokens, token_stride: set.head_dim() };
            let turn_back = frame.as_ref().map(|(back, _)| back);
            stream.encode_block(
                best_isa(),
                tokens,
                turn_back,
                &mut block[set.head_range(head)],
                &mut scratch,
            )?;
        }
    }
    Ok(())
}

fn decode_all<E: Element>(
    set: &StreamSet,
    packed: &[u8],
    n_blocks: usize,
    position: usize,
    out: &mut [E],
) -> Result<(), CacheError> {
    let (len, bytes, heads) = (set.block_len(), set.block_bytes(), set.streams().len());
    let mut scratch = Scratch::default();
    for (at, out) in out.chunks_exact_mut(len * set.head_dim()).enumerate() {
        let (row, head, block) = (at / n_blocks / heads, at / n_blocks % heads, at % n_blocks);
        let frame = set.frame(position + block * len);
        let turn_forward = frame.as_ref().map(|(_, forward)| forward);
        let from = (row * n_blocks + block) * bytes;
        let packed = &packed[from..from + bytes][set.head_range(head)];
        set.streams()[head].decode_block(best_isa(), packed, turn_forward, out, &mut scratch)?;
    }
    Ok(())
}

#[pymethods]
impl StreamSetCodec {
    /// Tokens in a block.
    #[getter]
    fn block_len(&self) -> usize {
        self.0.block_len()
    }

    /// Components of a vector.
    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    /// KV heads.
    #[getter]
    fn n_heads(&self) -> usize {
        self.0.streams().len()
    }

    /// Digest of the preset that it was made from, layer and side; None for another one.
    #[getter]
    fn id(&self) -> Option<(String, usize, &'static str)> {
        self.0.id().map(|id| (id.digest.to_string(), id.layer, id.side.name()))
    }

    /// Bytes of one packed block of all heads.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }

    /// Bits a value, side information included.
    #[getter]
    fn bits_per_value(&self) -> f64 {
        self.0.bits_per_value()
    }

    /// Frequencies, rotary_dim and pairing of the keys' rotation, or None.
    #[getter]
    fn rope(&self) -> Option<(&'static str, usize, Vec<f64>)> {
        let rope = self.0.rope()?;
        Some((rope.pairing().name(), rope.rotary_dim(), rope.inv_freq().to_vec()))
    }

    /// The coding tables of one head, as little-endian float32 (and one byte a width), for other implementations.
    fn tables<'py>(&self, py: Python<'py>, head: usize) -> PyResult<Bound<'py, PyDict>> {
        let stream = self.0.streams().get(head).ok_or_else(|| {
            exception(
                "ShapeError",
                format!("head {head} does not exist, there are {}", self.0.streams().len()),
            )
        })?;
        let tables = PyDict::new(py);
        let widths: Vec<u8> = stream.widths().map(|width| width.bits() as u8).collect();
        tables.set_item("widths", PyBytes::new(py, &widths))?;
        tables.set_item("analysis", bytes_of(py, stream.analysis()))?;
        tables.set_item("synthesis", bytes_of(py, stream.synthesis()))?;
        tables.set_item("coded_mean", bytes_of(py, stream.coded_mean()))?;
        tables.set_item("shape_mean", bytes_of(py, stream.shape_mean()))?;
        tables.set_item("step_cost", bytes_of(py, stream.step_cost()))?;
        tables.set_item("drift_units", bytes_of(py, stream.drift_units()))?;
        Ok(tables)
    }

    /// Encodes `x` `[batch, heads, tokens, head_dim]`, whose first token has the given position, into `packed`
    /// `[batch, tokens / block_len, block_bytes]` uint8.
    fn encode(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        position: usize,
        packed: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (x, packed) = (RawTensor::new(x, "the vectors", 4)?, RawTensor::new(packed, "packed blocks", 3)?);
        self.check_blocks(&x.shape)?;
        self.check_packed(&packed, &x)?;
        with_element!(x.dtype()?, E => {
            // SAFETY: dtypes were checked; both tensors are arguments of this call and so alive until it returns.
            let (view, out) = unsafe { (x.view::<E>()?, packed.slice_mut::<u8>("packed blocks")?) };
            let coding = Coding::Blocks(Arc::clone(&self.0));
            py.detach(|| coding.check_values(&view, "vectors").and_then(|()| encode_all(&self.0, &view, position, out)))
        })
        .map_err(to_python)
    }

    /// Decodes what `encode` gave into the contiguous `out` `[batch, heads, tokens, head_dim]`.
    fn decode(
        &self,
        py: Python<'_>,
        packed: &Bound<'_, PyAny>,
        position: usize,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (packed, out) =
            (RawTensor::new(packed, "packed blocks", 3)?, RawTensor::new(out, "the output", 4)?);
        self.check_blocks(&out.shape)?;
        self.check_packed(&packed, &out)?;
        let n_blocks = packed.shape[1];
        with_element!(out.dtype()?, E => {
            // SAFETY: as in `encode`.
            let (packed, out) = unsafe { (packed.contiguous::<u8>("packed blocks")?, out.slice_mut::<E>("the output")?) };
            py.detach(|| decode_all(&self.0, packed, n_blocks, position, out))
        })
        .map_err(to_python)
    }
}

/// The seed's rank and int8 (or float16) coder.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct LowRankCodec(pub(crate) Arc<LowRank>);

#[pymethods]
impl LowRankCodec {
    /// `u` `[head_dim, rank]` and `mean` `[head_dim]`, float32 and contiguous; `bits` is 8 or 16.
    #[new]
    fn new(u: &Bound<'_, PyAny>, mean: &Bound<'_, PyAny>, bits: u8) -> PyResult<Self> {
        let storage = match bits {
            8 => Storage::Int8,
            16 => Storage::Float16,
            other => {
                return Err(exception(
                    "ShapeError",
                    format!("bits is {other}, expected 8 (int8) or 16 (float16)"),
                ));
            }
        };
        let (u, mean) = (RawTensor::new(u, "U", 2)?, RawTensor::new(mean, "mean", 1)?);
        u.expect_dtype("U", "float32")?;
        mean.expect_dtype("mean", "float32")?;
        // SAFETY: dtypes were checked; both tensors live as long as this call.
        let (u_values, mean_values) = unsafe { (u.contiguous::<f32>("U")?, mean.contiguous::<f32>("mean")?) };
        let coder = LowRank::new(u_values, mean_values, u.shape[1], storage).map_err(to_python)?;
        Ok(Self(Arc::new(coder)))
    }

    /// Bytes of one coded vector.
    #[getter]
    fn vector_bytes(&self) -> usize {
        self.0.vector_bytes()
    }

    /// Encodes contiguous vectors `[n, head_dim]` into `[n, vector_bytes]` uint8.
    fn encode(&self, py: Python<'_>, x: &Bound<'_, PyAny>, coded: &Bound<'_, PyAny>) -> PyResult<()> {
        let (x, coded) = (RawTensor::new(x, "the vectors", 2)?, RawTensor::new(coded, "coded vectors", 2)?);
        self.check(&x, &coded)?;
        let (d, bytes) = (self.0.head_dim(), self.0.vector_bytes());
        with_element!(x.dtype()?, E => {
            // SAFETY: dtypes were checked; the tensors live as long as this call.
            let (x, coded) = unsafe { (x.contiguous::<E>("the vectors")?, coded.slice_mut::<u8>("coded vectors")?) };
            py.detach(|| {
                x.chunks_exact(d).zip(coded.chunks_exact_mut(bytes)).for_each(|(x, out)| self.0.encode(x, out));
            });
        });
        Ok(())
    }

    /// Decodes `[n, vector_bytes]` uint8 into contiguous vectors `[n, head_dim]`.
    fn decode(&self, py: Python<'_>, coded: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (coded, out) =
            (RawTensor::new(coded, "coded vectors", 2)?, RawTensor::new(out, "the output", 2)?);
        self.check(&out, &coded)?;
        let (d, bytes) = (self.0.head_dim(), self.0.vector_bytes());
        with_element!(out.dtype()?, E => {
            // SAFETY: as in `encode`.
            let (coded, out) = unsafe { (coded.contiguous::<u8>("coded vectors")?, out.slice_mut::<E>("the output")?) };
            py.detach(|| {
                coded.chunks_exact(bytes).zip(out.chunks_exact_mut(d)).for_each(|(coded, x)| self.0.decode(coded, x));
            });
        });
        Ok(())
    }
}

impl LowRankCodec {
    fn check(&self, vectors: &RawTensor, coded: &RawTensor) -> PyResult<()> {
        coded.expect_dtype("coded vectors", "uint8")?;
        let n = vectors.shape[0];
        let (d, bytes) = (self.0.head_dim(), self.0.vector_bytes());
        if vectors.shape[1] != d || coded.shape != [n, bytes] {
            let message = format!(
                "vectors of shape {:?} and codes of shape {:?}, expected [n, {d}] and [n, {bytes}]",
                vectors.shape, coded.shape
            );
            return Err(exception("ShapeError", message));
        }
        Ok(())
    }
}
