//! The JSON mirror of the data model, shared by both formats: the JSON file is one [`FileWire`], and the
//! metadata of a safetensors file is another, with `layer_rope` in place of `layers`.
//!
//! Nearly everything is optional here, so that what is absent is reported by name and not by the parser.

use std::fmt;

use kvlathe_codec::{MAX_HEAD_DIM, Pairing, Rope};
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::limited_wire::{Bounded, Free, MAX_FREE_BYTES, Matrix, Numbers};
use crate::validate::{check_rope, check_version, largest_key, validate_meta};
use crate::{LatheMeta, LayerShape, MAX_KV_HEADS, MAX_LAYERS, Meta, PresetError, UNIFORM_VERSION};

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
    /// KV heads, components of a key and of a value; `null` for a layer that is not coded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer_shapes: Option<Bounded<Option<[usize; 3]>, MAX_LAYERS>>,
    block_len: Option<usize>,
    n_sinks: Option<usize>,
    bits_per_value: Option<f64>,
    #[serde(default)]
    fingerprint: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    cache_fingerprint: String,
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
    pairing: PairingWire,
    rotary_dim: usize,
    inv_freq: Bounded<f64, MAX_HEAD_DIM>,
}

/// A [`Pairing`] by its name.
struct PairingWire(Pairing);

impl Serialize for PairingWire {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.name())
    }
}

impl<'de> Deserialize<'de> for PairingWire {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
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
    /// The metadata. It is validated, so every size is bounded before any array is looked at.
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
        let (lathe, ropes) = self.kvlathe.take().map(LatheWire::into_meta).transpose()?.unzip();
        let mut meta = Meta { model, rank, head_dim, n_layers, n_heads, compression_ratio, lathe };
        validate_meta(&meta)?;
        if let (Some(lathe), Some(ropes)) = (&mut meta.lathe, ropes) {
            let most = largest_key(lathe, head_dim);
            let ropes = ropes.into_iter().enumerate().map(|(index, rope)| rope.into_rope(index, most));
            lathe.rope = ropes.collect::<Result<_, _>>()?;
        }
        Ok(meta)
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
    /// All but the rotations, and those as they are written.
    fn into_meta(self) -> Result<(LatheMeta, Vec<RopeWire>), PresetError> {
        let format_version = require(self.format_version, "kvlathe.format_version")?;
        let shape =
            |[n_kv_heads, key_dim, value_dim]: [usize; 3]| LayerShape { n_kv_heads, key_dim, value_dim };
        // An unknown key in older versions, so it is ignored there.
        let layer_shapes = self.layer_shapes.filter(|_| format_version > UNIFORM_VERSION);
        let lathe = LatheMeta {
            format_version,
            layer_shapes: layer_shapes.map(|shapes| shapes.0.into_iter().map(|one| one.map(shape)).collect()),
            library_version: self.library_version,
            n_kv_heads: require(self.n_kv_heads, "kvlathe.n_kv_heads")?,
            block_len: require(self.block_len, "kvlathe.block_len")?,
            n_sinks: require(self.n_sinks, "kvlathe.n_sinks")?,
            bits_per_value: require(self.bits_per_value, "kvlathe.bits_per_value")?,
            fingerprint: self.fingerprint,
            cache_fingerprint: self.cache_fingerprint,
            model_type: self.model_type,
            created: self.created,
            calibration: self.calibration.0,
            measured: self.measured.0,
            rope: Vec::new(),
        };
        Ok((lathe, self.rope.0))
    }

    fn from_meta(lathe: &LatheMeta) -> Self {
        let rope = lathe.rope.iter().map(|rope| RopeWire {
            pairing: PairingWire(rope.pairing()),
            rotary_dim: rope.rotary_dim(),
            inv_freq: Bounded(rope.inv_freq().to_vec()),
        });
        Self {
            format_version: Some(lathe.format_version),
            library_version: lathe.library_version.clone(),
            n_kv_heads: Some(lathe.n_kv_heads),
            layer_shapes: lathe.layer_shapes.as_ref().map(|shapes| {
                let sizes = |shape: LayerShape| [shape.n_kv_heads, shape.key_dim, shape.value_dim];
                Bounded(shapes.iter().map(|shape| shape.map(sizes)).collect())
            }),
            block_len: Some(lathe.block_len),
            n_sinks: Some(lathe.n_sinks),
            bits_per_value: Some(lathe.bits_per_value),
            fingerprint: lathe.fingerprint.clone(),
            cache_fingerprint: lathe.cache_fingerprint.clone(),
            model_type: lathe.model_type.clone(),
            created: lathe.created.clone(),
            calibration: Free(lathe.calibration.clone()),
            measured: Free(lathe.measured.clone()),
            rope: Bounded(rope.collect()),
        }
    }
}

impl RopeWire {
    fn into_rope(self, index: usize, head_dim: usize) -> Result<Rope, PresetError> {
        let Self { pairing: PairingWire(pairing), rotary_dim, inv_freq: Bounded(inv_freq) } = self;
        // Before the codec does, which cannot say where it stands.
        check_rope(index, head_dim, rotary_dim, &inv_freq)?;
        Rope::new(pairing, rotary_dim, inv_freq).map_err(|error| {
            PresetError::invalid(format!("kvlathe.rope[{index}]"), error, "a rotation that the codec has")
        })
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
