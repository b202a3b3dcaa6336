//! Preset files as Python objects.

use std::sync::{Arc, OnceLock};

use kvlathe::codec::{Digest, ParseNameError, Side, Storage, StreamId};
use kvlathe::preset::{LatheMeta, LayerShape, Meta, Preset as PresetData};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Value, json};

use crate::codec::{LowRankCodec, StreamSetCodec};
use crate::error::{exception, to_python};

/// A preset: immutable; changes give a new one.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct Preset {
    data: PresetData,
    /// Computed when it is first asked for: that takes a pass over all arrays.
    digest: OnceLock<Option<Digest>>,
}

impl From<PresetData> for Preset {
    fn from(data: PresetData) -> Self {
        Self { data, digest: OnceLock::new() }
    }
}

/// Rank, U and mean of a shared basis, the arrays as float32 bytes.
type SharedArrays<'py> = (usize, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// The fingerprint of a model's config (JSON): what decides the contents of its cache, and the size of its vocabulary.
#[pyfunction]
pub(crate) fn fingerprint(config_json: &str) -> PyResult<String> {
    Ok(kvlathe::preset::fingerprint(&parse(config_json, "the model's config")?))
}

/// The fingerprint of a model's config (JSON) without the size of its vocabulary.
#[pyfunction]
pub(crate) fn cache_fingerprint(config_json: &str) -> PyResult<String> {
    Ok(kvlathe::preset::cache_fingerprint(&parse(config_json, "the model's config")?))
}

fn parse(text: &str, what: &str) -> PyResult<Value> {
    serde_json::from_str(text)
        .map_err(|error| exception("PresetError", format!("{what} is not JSON: {error}")))
}

fn field<'a>(value: &'a Value, key: &str) -> PyResult<&'a Value> {
    value.get(key).ok_or_else(|| exception("PresetError", format!("the preset's meta data lack {key:?}")))
}

fn text(value: &Value, key: &str) -> PyResult<String> {
    Ok(field(value, key)?.as_str().unwrap_or_default().to_owned())
}

fn count(value: &Value, key: &str) -> PyResult<usize> {
    let number = field(value, key)?.as_u64();
    number
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| exception("PresetError", format!("{key:?} of the preset's meta data is no count")))
}

/// Meta data of a new preset from the JSON object that calibration writes.
pub(crate) fn meta_from_json(json: &str) -> PyResult<Meta> {
    let value = parse(json, "the preset's meta data")?;
    let map = |key: &str| value.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    let (rank, head_dim) = (count(&value, "rank")?, count(&value, "head_dim")?);
    Ok(Meta {
        model: text(&value, "model")?,
        rank,
        head_dim,
        n_layers: count(&value, "n_layers")?,
        n_heads: count(&value, "n_heads")?,
        compression_ratio: 16.0 * head_dim as f64 / (8.0 * rank as f64),
        lathe: Some(LatheMeta {
            format_version: kvlathe::preset::UNIFORM_VERSION,
            library_version: env!("CARGO_PKG_VERSION").to_owned(),
            n_kv_heads: count(&value, "n_kv_heads")?,
            layer_shapes: None,
            block_len: count(&value, "block_len")?,
            n_sinks: count(&value, "n_sinks")?,
            bits_per_value: 0.0,
            fingerprint: text(&value, "fingerprint")?,
            cache_fingerprint: text(&value, "cache_fingerprint").unwrap_or_default(),
            model_type: text(&value, "model_type")?,
            created: text(&value, "created")?,
            calibration: map("calibration"),
            measured: map("measured"),
            rope: Vec::new(),
        }),
    })
}

/// A side by its name, "key" or "value".
pub(crate) fn side(name: &str) -> PyResult<Side> {
    name.parse().map_err(|error: ParseNameError| exception("ShapeError", error.to_string()))
}

impl Preset {
    fn check_layer(&self, layer: usize) -> PyResult<()> {
        let count = self.data.layers().len();
        if layer < count {
            return Ok(());
        }
        Err(exception("ShapeError", format!("layer {layer} does not exist, the preset has {count}")))
    }
}

#[pymethods]
impl Preset {
    /// Reads a `.json` or `.safetensors` preset.
    #[staticmethod]
    fn read(path: std::path::PathBuf) -> PyResult<Self> {
        PresetData::read(path).map(kvlathe::upgraded).map(Self::from).map_err(to_python)
    }

    /// Reads a preset from the bytes of its file.
    #[staticmethod]
    fn from_bytes(bytes: &[u8]) -> PyResult<Self> {
        PresetData::from_bytes(bytes).map(kvlathe::upgraded).map(Self::from).map_err(to_python)
    }

    /// Writes the preset; the extension chooses the format.
    fn write(&self, path: std::path::PathBuf) -> PyResult<()> {
        self.data.write(path).map_err(to_python)
    }

    /// The file contents as JSON text.
    fn to_json(&self) -> PyResult<String> {
        self.data.to_json_string().map_err(to_python)
    }

    /// The file contents as safetensors bytes.
    fn to_safetensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.data.to_safetensors_bytes().map_err(to_python)?))
    }

    /// Everything but the arrays, as JSON text.
    fn meta_json(&self) -> String {
        let meta = self.data.meta();
        let lathe = self.data.lathe().map(|lathe| {
            json!({
                "format_version": lathe.format_version,
                "library_version": lathe.library_version,
                "n_kv_heads": lathe.n_kv_heads,
                "block_len": lathe.block_len,
                "n_sinks": lathe.n_sinks,
                "bits_per_value": lathe.bits_per_value,
                "fingerprint": lathe.fingerprint,
                "cache_fingerprint": lathe.cache_fingerprint,
                "model_type": lathe.model_type,
                "created": lathe.created,
                "calibration": lathe.calibration,
                "measured": lathe.measured,
            })
        });
        json!({
            "model": meta.model,
            "rank": meta.rank,
            "head_dim": meta.head_dim,
            "n_layers": meta.n_layers,
            "n_heads": meta.n_heads,
            "compression_ratio": meta.compression_ratio,
            "kvlathe": lathe,
        })
        .to_string()
    }

    /// SHA-256 of all that packed blocks depend on, 64 lower-case hex digits; None for seed presets.
    #[getter]
    fn digest(&self, py: Python<'_>) -> Option<String> {
        py.detach(|| *self.digest.get_or_init(|| self.data.digest())).map(|digest| digest.to_string())
    }

    /// Of each layer KV heads, components of a key and of a value; None of a layer that is not coded.
    #[getter]
    fn layer_shapes(&self) -> Vec<Option<(usize, usize, usize)>> {
        let meta = self.data.meta();
        let sizes = |shape: LayerShape| (shape.n_kv_heads, shape.key_dim, shape.value_dim);
        (0..meta.n_layers).map(|layer| meta.layer_shape(layer).map(sizes)).collect()
    }

    /// Bits a value that gains, guards and drift take at any rate; 0 for seed presets.
    #[getter]
    fn side_bits_per_value(&self) -> f64 {
        kvlathe::side_bits_per_value(&self.data)
    }

    /// The same preset at another rate, in bits a value with side information.
    fn with_bits(&self, py: Python<'_>, bits_per_value: f64) -> PyResult<Self> {
        py.detach(|| kvlathe::with_bits(&self.data, bits_per_value)).map(Self::from).map_err(to_python)
    }

    /// What coding each layer's keys and its values is expected to cost at this rate, nats a token.
    fn expected_costs(&self) -> PyResult<Vec<(f64, f64)>> {
        let costs = kvlathe::expected_costs(&self.data).map_err(to_python)?;
        Ok(costs.into_iter().map(|[key, value]| (key, value)).collect())
    }

    /// The same calibration, without a rate, with the importances of each layer's keys and values times a factor.
    fn with_cost_factors(&self, factors: Vec<(f64, f64)>) -> PyResult<Self> {
        let factors: Vec<[f64; 2]> = factors.into_iter().map(|(key, value)| [key, value]).collect();
        kvlathe::with_cost_factors(&self.data, &factors).map(Self::from).map_err(to_python)
    }

    /// The same preset with what was measured of it (a JSON object).
    fn with_measured(&self, measured_json: &str) -> PyResult<Self> {
        let Value::Object(measured) = parse(measured_json, "what was measured")? else {
            return Err(exception("PresetError", "what was measured must be a JSON object".into()));
        };
        let mut preset = self.data.clone();
        if let Some(lathe) = &mut preset.meta.lathe {
            lathe.measured = measured;
        }
        Ok(Self::from(preset))
    }

    /// Refuses a model whose config (JSON) has another fingerprint.
    fn check_model(&self, config_json: &str) -> PyResult<()> {
        self.data.check_model(&parse(config_json, "the model's config")?).map_err(to_python)
    }

    /// The codec of one layer's "key" or "value" side: StreamSetCodec, LowRankCodec or None (exact).
    fn codec<'py>(&self, py: Python<'py>, layer: usize, side_name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.check_layer(layer)?;
        let side = side(side_name)?;
        let Some(digest) = py.detach(|| *self.digest.get_or_init(|| self.data.digest())) else {
            // A seed-style preset: keys stay as they are, values where it says so.
            let shared = self.data.shared(layer, side).filter(|_| side == Side::Value);
            let coder = shared.map(|shared| kvlathe::low_rank(shared, Storage::Int8)).transpose();
            return match coder.map_err(to_python)? {
                None => Ok(py.None().into_bound(py)),
                Some(coder) => Ok(Bound::new(py, LowRankCodec(Arc::new(coder)))?.into_any()),
            };
        };
        if self.data.layers()[layer].side(side).streams.is_empty() {
            return Ok(py.None().into_bound(py));
        }
        let id = StreamId { digest, layer, side };
        let set = py.detach(|| kvlathe::stream_set(&self.data, id)).map_err(to_python)?;
        Ok(Bound::new(py, StreamSetCodec(Arc::new(set)))?.into_any())
    }

    /// The seed's arrays of one side: (rank, U as float32 bytes `[head_dim, rank]`, mean as float32 bytes), or None.
    fn shared<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        side_name: &str,
    ) -> PyResult<Option<SharedArrays<'py>>> {
        self.check_layer(layer)?;
        let bytes = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            PyBytes::new(py, &bytes)
        };
        let shared = self.data.shared(layer, side(side_name)?);
        Ok(shared.map(|shared| (shared.rank, bytes(&shared.u), bytes(&shared.mean))))
    }

    /// Widths of one side's streams, `[n_kv_heads][head_dim]` bits; empty for seed presets.
    fn widths(&self, layer: usize, side_name: &str) -> PyResult<Vec<Vec<u8>>> {
        self.check_layer(layer)?;
        let streams = &self.data.layers()[layer].side(side(side_name)?).streams;
        Ok(streams.iter().map(|stream| stream.widths.clone()).collect())
    }
}
