//! Preset files as Python objects.

use kvlathe::cache::Coding;
use kvlathe::preset::{LatheMeta, Meta, Preset as PresetData, Side, fingerprint as config_fingerprint};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Value, json};

use crate::codec::{LowRankCodec, StreamSetCodec};
use crate::error::{exception, to_python};

/// A preset: immutable; changes give a new one.
#[pyclass(frozen, module = "kvlathe._native")]
pub(crate) struct Preset(pub(crate) PresetData);

/// Rank, U and mean of a shared basis, the arrays as float32 bytes.
type SharedArrays<'py> = (usize, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// The fingerprint of a model's config (JSON): what decides the contents of its cache.
#[pyfunction]
pub(crate) fn fingerprint(config_json: &str) -> PyResult<String> {
    Ok(config_fingerprint(&parse(config_json, "the model's config")?))
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
            format_version: kvlathe::preset::FORMAT_VERSION,
            library_version: env!("CARGO_PKG_VERSION").to_owned(),
            n_kv_heads: count(&value, "n_kv_heads")?,
            block_len: count(&value, "block_len")?,
            n_sinks: count(&value, "n_sinks")?,
            bits_per_value: 0.0,
            fingerprint: text(&value, "fingerprint")?,
            model_type: text(&value, "model_type")?,
            created: text(&value, "created")?,
            calibration: map("calibration"),
            measured: map("measured"),
            rope: Vec::new(),
        }),
    })
}

fn side(name: &str) -> PyResult<Side> {
    match name {
        "key" => Ok(Side::Key),
        "value" => Ok(Side::Value),
        other => Err(exception("ShapeError", format!("side {other:?}, expected \"key\" or \"value\""))),
    }
}

impl Preset {
    fn check_layer(&self, layer: usize) -> PyResult<()> {
        let count = self.0.layers().len();
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
        PresetData::read(path).map(kvlathe::upgraded).map(Self).map_err(to_python)
    }

    /// Reads a preset from the bytes of its file.
    #[staticmethod]
    fn from_bytes(bytes: &[u8]) -> PyResult<Self> {
        PresetData::from_bytes(bytes).map(kvlathe::upgraded).map(Self).map_err(to_python)
    }

    /// Writes the preset; the extension chooses the format.
    fn write(&self, path: std::path::PathBuf) -> PyResult<()> {
        self.0.write(path).map_err(to_python)
    }

    /// The file contents as JSON text.
    fn to_json(&self) -> PyResult<String> {
        self.0.to_json_string().map_err(to_python)
    }

    /// The file contents as safetensors bytes.
    fn to_safetensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.0.to_safetensors_bytes().map_err(to_python)?))
    }

    /// Everything but the arrays, as JSON text.
    fn meta_json(&self) -> String {
        let meta = self.0.meta();
        let lathe = self.0.lathe().map(|lathe| {
            json!({
                "format_version": lathe.format_version,
                "library_version": lathe.library_version,
                "n_kv_heads": lathe.n_kv_heads,
                "block_len": lathe.block_len,
                "n_sinks": lathe.n_sinks,
                "bits_per_value": lathe.bits_per_value,
                "fingerprint": lathe.fingerprint,
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

    /// Bits a value that gains, guards and drift take at any rate; 0 for seed presets.
    #[getter]
    fn side_bits_per_value(&self) -> f64 {
        let head_dim = self.0.meta().head_dim;
        self.0.lathe().map_or(0.0, |lathe| kvlathe::side_bits_per_value(head_dim, lathe.block_len))
    }

    /// The same preset at another rate, in bits a value with side information.
    fn with_bits(&self, py: Python<'_>, bits_per_value: f64) -> PyResult<Self> {
        py.detach(|| kvlathe::with_bits(&self.0, bits_per_value)).map(Self).map_err(to_python)
    }

    /// What coding each layer's keys and its values is expected to cost at this rate, nats a token.
    fn expected_costs(&self) -> PyResult<Vec<(f64, f64)>> {
        let costs = kvlathe::expected_costs(&self.0).map_err(to_python)?;
        Ok(costs.into_iter().map(|[key, value]| (key, value)).collect())
    }

    /// The same calibration, without a rate, with the importances of each layer's keys and values times a factor.
    fn with_cost_factors(&self, factors: Vec<(f64, f64)>) -> PyResult<Self> {
        let factors: Vec<[f64; 2]> = factors.into_iter().map(|(key, value)| [key, value]).collect();
        kvlathe::with_cost_factors(&self.0, &factors).map(Self).map_err(to_python)
    }

    /// The same preset with what was measured of it (a JSON object).
    fn with_measured(&self, measured_json: &str) -> PyResult<Self> {
        let Value::Object(measured) = parse(measured_json, "what was measured")? else {
            return Err(exception("PresetError", "what was measured must be a JSON object".into()));
        };
        let mut preset = self.0.clone();
        if let Some(lathe) = &mut preset.meta.lathe {
            lathe.measured = measured;
        }
        Ok(Self(preset))
    }

    /// Refuses a model whose config (JSON) has another fingerprint.
    fn check_model(&self, config_json: &str) -> PyResult<()> {
        self.0.check_model(&parse(config_json, "the model's config")?).map_err(to_python)
    }

    /// The codec of one layer's "key" or "value" side: StreamSetCodec, LowRankCodec or None (exact).
    fn codec<'py>(&self, py: Python<'py>, layer: usize, side_name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.check_layer(layer)?;
        let side = side(side_name)?;
        let coding = py.detach(|| kvlathe::coding(&self.0, layer, side)).map_err(to_python)?;
        Ok(match coding {
            Coding::Exact => py.None().into_bound(py),
            Coding::Blocks(set) => Bound::new(py, StreamSetCodec(set))?.into_any(),
            Coding::LowRank(coder) => Bound::new(py, LowRankCodec(coder))?.into_any(),
        })
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
        let shared = self.0.shared(layer, side(side_name)?);
        Ok(shared.map(|shared| (shared.rank, bytes(&shared.u), bytes(&shared.mean))))
    }

    /// Widths of one side's streams, `[n_kv_heads][head_dim]` bits; empty for seed presets.
    fn widths(&self, layer: usize, side_name: &str) -> PyResult<Vec<Vec<u8>>> {
        self.check_layer(layer)?;
        let streams = &self.0.layers()[layer].side(side(side_name)?).streams;
        Ok(streams.iter().map(|stream| stream.widths.clone()).collect())
    }
}
