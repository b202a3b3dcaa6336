//! The JSON mirror of the data model, shared by both formats: the JSON file is one [`FileWire`], and the
//! metadata of a safetensors file is another, with `layer_rope` in place of `layers`.
//!
//! Nearly everything is optional here, so that what is absent is reported by name and not by the parser.
//! Sequences stop at the format's limits while they are parsed: `[{},{},…` costs 3 bytes an element on disk
//! and far more in memory.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::validate::check_version;
use crate::{LatheMeta, MAX_HEAD_DIM, MAX_KV_HEADS, MAX_LAYERS, Meta, Pairing, PresetError, RopeDescription};

/// Largest free-form section, in bytes of JSON. Parsed JSON can take a hundred times the memory of its text.
const MAX_FREE_BYTES: usize = 1 << 20;

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct FileWire {
    model: Option<String>,
    rank: Option<usize>,
    head_dim: Option<usize>,
    n_layers: Option<usize>,
    n_heads: Option<usize>,
    compression_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kvlathe: Option<LatheWire>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_rope: Option<Bounded<Option<usize>, MAX_LAYERS>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Bounded<LayerWire, MAX_LAYERS>>,
}

#[derive(Serialize, Deserialize)]
struct LatheWire {
    format_version: Option<u32>,
    #[serde(default)]
    library_version: String,
    n_kv_heads: Option<usize>,
    block_len: Option<usize>,
    n_sinks: Option<usize>,
    bits_per_value: Option<f64>,
    #[serde(default)]
    fingerprint: String,
    #[serde(default)]
    model_type: String,
    #[serde(default)]
    created: String,
    #[serde(default)]
    calibration: Free,
    #[serde(default)]
    measured: Free,
    #[serde(default)]
    rope: Bounded<RopeWire, MAX_LAYERS>,
}

#[derive(Serialize, Deserialize)]
struct RopeWire {
    pairing: Pairing,
    rotary_dim: usize,
    inv_freq: Bounded<f64, MAX_HEAD_DIM>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct LayerWire {
    /// Outer `None`: no such key, as in a seed preset. Inner `None`: `null`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<Option<usize>>,
    #[serde(rename = "K", default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SideWire>,
    #[serde(rename = "V", default, skip_serializing_if = "Option::is_none")]
    pub value: Option<SideWire>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct SideWire {
    #[serde(rename = "U")]
    pub u: Option<Matrix>,
    pub mean: Option<Numbers>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<Streams>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct StreamWire {
    pub mean: Option<Numbers>,
    pub basis: Option<Matrix>,
    pub importance: Option<Numbers>,
    pub widths: Option<Bounded<u8, MAX_HEAD_DIM>>,
}

impl StreamWire {
    fn is_whole(&self) -> bool {
        self.mean.is_some() && self.basis.is_some() && self.importance.is_some() && self.widths.is_some()
    }
}

impl FileWire {
    /// The metadata, not yet validated.
    pub fn take_meta(&mut self) -> Result<Meta, PresetError> {
        let missing = || PresetError::missing("model");
        let model = self.model.take().ok_or_else(missing)?;
        let rank = require(self.rank, "rank")?;
        let head_dim = require(self.head_dim, "head_dim")?;
        let n_layers = require(self.n_layers, "n_layers")?;
        let n_heads = require(self.n_heads, "n_heads")?;
        // 16 bits a number before, one int8 a coefficient after.
        let by_rank = 16.0 * head_dim as f64 / (8.0 * rank as f64);
        let compression_ratio = self.compression_ratio.unwrap_or(by_rank);
        let lathe = self.kvlathe.take().map(LatheWire::into_meta).transpose()?;
        Ok(Meta { model, rank, head_dim, n_layers, n_heads, compression_ratio, lathe })
    }

    pub fn from_meta(meta: &Meta) -> Self {
        Self {
            model: Some(meta.model.clone()),
            rank: Some(meta.rank),
            head_dim: Some(meta.head_dim),
            n_layers: Some(meta.n_layers),
            n_heads: Some(meta.n_heads),
            compression_ratio: Some(meta.compression_ratio),
            kvlathe: meta.lathe.as_ref().map(LatheWire::from_meta),
            layer_rope: None,
            layers: None,
        }
    }
}

impl LatheWire {
    fn into_meta(self) -> Result<LatheMeta, PresetError> {
        let rope = self.rope.0.into_iter().map(|rope| RopeDescription {
            pairing: rope.pairing,
            rotary_dim: rope.rotary_dim,
            inv_freq: rope.inv_freq.0,
        });
        Ok(LatheMeta {
            format_version: require(self.format_version, "kvlathe.format_version")?,
            library_version: self.library_version,
            n_kv_heads: require(self.n_kv_heads, "kvlathe.n_kv_heads")?,
            block_len: require(self.block_len, "kvlathe.block_len")?,
            n_sinks: require(self.n_sinks, "kvlathe.n_sinks")?,
            bits_per_value: require(self.bits_per_value, "kvlathe.bits_per_value")?,
            fingerprint: self.fingerprint,
            model_type: self.model_type,
            created: self.created,
            calibration: self.calibration.0,
            measured: self.measured.0,
            rope: rope.collect(),
        })
    }

    fn from_meta(lathe: &LatheMeta) -> Self {
        let rope = lathe.rope.iter().map(|rope| RopeWire {
            pairing: rope.pairing,
            rotary_dim: rope.rotary_dim,
            inv_freq: Bounded(rope.inv_freq.clone()),
        });
        Self {
            format_version: Some(lathe.format_version),
            library_version: lathe.library_version.clone(),
            n_kv_heads: Some(lathe.n_kv_heads),
            block_len: Some(lathe.block_len),
            n_sinks: Some(lathe.n_sinks),
            bits_per_value: Some(lathe.bits_per_value),
            fingerprint: lathe.fingerprint.clone(),
            model_type: lathe.model_type.clone(),
            created: lathe.created.clone(),
            calibration: Free(lathe.calibration.clone()),
            measured: Free(lathe.measured.clone()),
            rope: Bounded(rope.collect()),
        }
    }
}

fn require<T>(value: Option<T>, key: &str) -> Result<T, PresetError> {
    value.ok_or_else(|| PresetError::missing(key))
}

/// Parses a [`FileWire`]. A file of a newer version may lack what we require or have it in another form, so
/// its version is looked at before anything else.
pub(crate) fn parse(text: &[u8], place: &'static str) -> Result<FileWire, PresetError> {
    let parsed: Result<FileWire, _> = serde_json::from_slice(text);
    let version = match &parsed {
        Ok(wire) => wire.kvlathe.as_ref().and_then(|lathe| lathe.format_version),
        Err(_) => probe_version(text),
    };
    version.map_or(Ok(()), check_version)?;
    parsed.map_err(|error| PresetError::json(place, &error))
}

fn probe_version(text: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct File {
        kvlathe: Lathe,
    }
    #[derive(Deserialize)]
    struct Lathe {
        format_version: u32,
    }
    serde_json::from_slice::<File>(text).ok().map(|file| file.kvlathe.format_version)
}

/// A free-form section that a reader would refuse is not written either.
pub(crate) fn check_free(meta: &Meta) -> Result<(), PresetError> {
    let Some(lathe) = &meta.lathe else { return Ok(()) };
    for (what, section) in
        [("kvlathe.calibration", &lathe.calibration), ("kvlathe.measured", &lathe.measured)]
    {
        let text =
            serde_json::to_string(section).map_err(|error| PresetError::json("writing JSON", &error))?;
        if text.len() > MAX_FREE_BYTES {
            let expected = format!("at most {MAX_FREE_BYTES}; leave out what is not needed");
            return Err(PresetError::invalid(format!("bytes of {what}"), text.len(), expected));
        }
    }
    Ok(())
}

/// The streams of one side, up to the first that lacks something: `{}` takes 3 bytes in a file and far more in memory.
#[derive(Default, Serialize)]
pub(crate) struct Streams(pub Vec<StreamWire>);

impl<'de> Deserialize<'de> for Streams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements;
        impl<'de> Visitor<'de> for Elements {
            type Value = Streams;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_KV_HEADS} streams")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Streams, A::Error> {
                let mut streams: Vec<StreamWire> = Vec::new();
                while streams.last().is_none_or(StreamWire::is_whole) {
                    let Some(stream) = seq.next_element()? else { return Ok(Streams(streams)) };
                    if streams.len() == MAX_KV_HEADS {
                        return Err(de::Error::custom(format!("a list of more than {MAX_KV_HEADS} entries")));
                    }
                    streams.push(stream);
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Streams(streams))
            }
        }
        deserializer.deserialize_seq(Elements)
    }
}

/// A free-form JSON object of at most [`MAX_FREE_BYTES`].
#[derive(Default, Serialize)]
struct Free(Map<String, Value>);

impl<'de> Deserialize<'de> for Free {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&RawValue>::deserialize(deserializer)?.get();
        if text.len() > MAX_FREE_BYTES {
            let given = text.len();
            return Err(de::Error::custom(format!(
                "a section of {given} bytes, at most {MAX_FREE_BYTES} are allowed"
            )));
        }
        serde_json::from_str(text)
            .map(Self)
            .map_err(|error| de::Error::custom(format!("a broken section: {error}")))
    }
}

/// A sequence of at most `N` elements.
pub(crate) struct Bounded<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize, const N: usize> Serialize for Bounded<T, N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Elements<T, N> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} entries")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = seq.next_element()? {
                    if elements.len() == N {
                        return Err(de::Error::custom(format!("a list of more than {N} entries")));
                    }
                    elements.push(element);
                }
                Ok(elements)
            }
        }
        deserializer.deserialize_seq(Elements::<T, N>(PhantomData)).map(Self)
    }
}

/// A list of at most [`MAX_HEAD_DIM`] numbers. `null`, which Python writes for nothing but people do, becomes
/// NaN, so that validation can say where it stands.
pub(crate) struct Numbers(pub Vec<f32>);

impl Serialize for Numbers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut numbers = Vec::new();
        Row { numbers: &mut numbers }.deserialize(deserializer)?;
        Ok(Self(numbers))
    }
}

/// Appends a list of numbers to `numbers` and returns how many there were.
struct Row<'a> {
    numbers: &'a mut Vec<f32>,
}

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = usize;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = usize;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_HEAD_DIM} numbers")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
        let mut n = 0;
        while let Some(number) = seq.next_element::<Option<f32>>()? {
            if n == MAX_HEAD_DIM {
                return Err(de::Error::custom(format!("a list of more than {MAX_HEAD_DIM} numbers")));
            }
            self.numbers.push(number.unwrap_or(f32::NAN));
            n += 1;
        }
        Ok(n)
    }
}

/// A list of rows, kept row-major.
pub(crate) struct Matrix {
    pub data: Vec<f32>,
    pub n_rows: usize,
    /// Length of the first row.
    pub n_cols: usize,
    /// The first row that is not as long as row 0, and its length.
    pub ragged: Option<(usize, usize)>,
}

impl Matrix {
    /// `data` has a multiple of `n_cols` numbers.
    pub fn new(data: Vec<f32>, n_cols: usize) -> Self {
        Self { n_rows: data.len() / n_cols.max(1), data, n_cols, ragged: None }
    }
}

impl Serialize for Matrix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rows = serializer.serialize_seq(Some(self.n_rows))?;
        for row in self.data.chunks_exact(self.n_cols.max(1)) {
            rows.serialize_element(row)?;
        }
        rows.end()
    }
}

impl<'de> Deserialize<'de> for Matrix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rows;
        impl<'de> Visitor<'de> for Rows {
            type Value = Matrix;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_HEAD_DIM} rows of numbers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Matrix, A::Error> {
                let mut matrix = Matrix { data: Vec::new(), n_rows: 0, n_cols: 0, ragged: None };
                while let Some(len) = seq.next_element_seed(Row { numbers: &mut matrix.data })? {
                    if matrix.n_rows == MAX_HEAD_DIM {
                        return Err(de::Error::custom(format!("a list of more than {MAX_HEAD_DIM} rows")));
                    }
                    if matrix.n_rows == 0 {
                        matrix.n_cols = len;
                    } else if len != matrix.n_cols && matrix.ragged.is_none() {
                        matrix.ragged = Some((matrix.n_rows, len));
                    }
                    matrix.n_rows += 1;
                }
                Ok(matrix)
            }
        }
        deserializer.deserialize_seq(Rows)
    }
}
