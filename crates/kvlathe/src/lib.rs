//! kvlathe keeps the key/value cache of a transformer language model in one to three bits a number, and attends to it
//! there.
//!
//! A model that writes a text remembers a key and a value for each token, layer and KV head, and reads all of them again
//! for each new token. Most of what it remembers does not matter to what it says next. kvlathe learns once, for each
//! model, which directions of these vectors do, and gives the bits to them. Attention reads the packed bytes as they
//! are; nothing is expanded.
//!
//! # The first minute
//!
//! A [`Preset`] is what was learnt about a model. It gives codecs for the keys and values of each layer, and these give
//! a [`LayerCache`] for each conversation. Here is a layer of SmolLM2-135M, with 3 KV heads of 64 components and 9 query
//! heads, and the preset that comes with kvlathe:
//!
//! ```
//! use kvlathe::{AttentionOptions, LayerCache, Preset, Side, Tensor};
//!
//! let preset = Preset::read("../../python/kvlathe/presets/smollm2-135m-instruct-balanced.safetensors")?;
//! let codings = &kvlathe::layer_codings(&preset)?[0];
//! let new_layer = || codings.cache(kvlathe::default_policy(&preset), 1); // a batch of one
//!
//! // A prompt of 1,000 tokens: the first and the latest stay exact, those between are packed, on two threads.
//! let mut random = fastrand::Rng::with_seed(7);
//! let mut tensor = |n_heads, n_tokens| Tensor::from_fn([1, n_heads, n_tokens, 64], || random.f32() - 0.5);
//! let (keys, values, queries) = (tensor(3, 1000), tensor(3, 1000), tensor(9, 1));
//! let mut layer = new_layer()?;
//! layer.append(keys.view(), values.view())?;
//! layer.settle(2)?;
//!
//! // What the newest token's queries find: a mean of values each, and the log-sum-exp of its scores.
//! let attend = |layer: &LayerCache<f32>| {
//!     let options = AttentionOptions { scaling: 0.125, ..AttentionOptions::default() };
//!     let (mut out, mut lse) = ([0.0; 9 * 64], [0.0; 9]);
//!     layer.attend(queries.view(), options, &mut out, Some(&mut lse), 1)?;
//!     Ok::<_, kvlathe::Error>((out, lse))
//! };
//! let answer = attend(&layer)?;
//!
//! // Blocks leave the layer by name, without being copied, and another layer attends to the same bytes.
//! let (keys, values) = (layer.export_side(Side::Key)?, layer.export_side(Side::Value)?);
//! let block = &keys.blocks[0][1];
//! assert_eq!((block.id.layer, block.id.side, block.first_position), (0, Side::Key, 64));
//! let mut other = new_layer()?;
//! other.import(keys.as_parts(), values.as_parts())?;
//! assert_eq!(attend(&other)?, answer);
//! # Ok::<(), kvlathe::Error>(())
//! ```
//!
//! (The path is that of a checkout. Any preset file will do, wherever it lies.)
//!
//! # The way of the data
//!
//! ```text
//! text ──▶ moments ──▶ basis ──▶ preset ──▶ codecs ──▶ cache ──▶ blocks ──▶ attention
//!          └────── calib ─────┘   preset     codec      └─────── cache ──────────┘
//! ```
//!
//! | crate | holds | to begin with |
//! |---|---|---|
//! | [`calib`] | what text tells of a model's keys and values, and the design made from it | [`ModelMoments`](calib::ModelMoments) |
//! | [`preset`] | files of that, their digest, the fingerprint of a model | [`Preset`] |
//! | [`codec`] | one block: bytes, kernels, and the reference that defines both | [`StreamSet`](codec::StreamSet) |
//! | [`cache`] | one layer's tokens: exact ones, blocks, attention over both | [`LayerCache`] |
//! | [`prefix`] | files of caches, mapped and checked; stores of prefixes | [`Container`](prefix::container::Container), [`PrefixStore`](prefix::PrefixStore) |
//!
//! This crate joins them:
//!
//! * [`layer_codings`] makes the codecs of a preset, and [`LayerCodings::cache`] a layer that uses them.
//! * [`with_bits`] is the same preset at another rate, in an instant: a calibration serves all of them.
//! * [`preset_from_design`] makes a preset of what [`calib`] has designed. Keys, values and gradients for that come from
//!   whoever runs the model.
//! * [`expected_costs`] and [`with_cost_factors`] weigh layers by what was measured.
//!
//! # What to rely on
//!
//! What is refused is a typed [`Error`] that says what was given, what was expected and what to do, and it leaves
//! everything as it was. Blocks carry the [digest](codec::Digest) of their preset, so that those of another preset, layer,
//! side or place are an error and not bad output. The same tokens give the same bytes on every processor.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod assembly;
mod codings;
mod costs;
mod error;

pub use assembly::{preset_from_design, side_bits_per_value, upgraded, with_bits};
pub use codings::{LayerCodings, default_policy, layer_codings, low_rank, stream_set};
pub use costs::{expected_costs, with_cost_factors};
pub use error::{Error, Result};
pub use kvlathe_cache::{AttentionOptions, LayerCache, Policy, Tensor, TensorView};
pub use kvlathe_codec::Side;
pub use kvlathe_preset::Preset;
pub use {
    kvlathe_cache as cache, kvlathe_calib as calib, kvlathe_codec as codec, kvlathe_prefix as prefix,
    kvlathe_preset as preset,
};
