//! The fingerprint of a model's config, which comes from a hub with the model: the input is `config.json`.

use kvlathe::preset::{cache_fingerprint, fingerprint};
use serde_json::Value;

/// Takes both fingerprints of a config.
pub(crate) fn run(bytes: &[u8]) {
    let Ok(mut config) = serde_json::from_slice::<Value>(bytes) else { return };
    let (digits, of_cache) = (fingerprint(&config), cache_fingerprint(&config));
    assert!(matches!((digits.len(), of_cache.len()), (0, 0) | (64, 0 | 64)), "{digits} {of_cache}");
    // What is null counts as absent, and so does what the list of keys leaves out.
    if let Some(config) = config.as_object_mut() {
        config.retain(|_, value| !value.is_null());
        config.insert("transformers_version".to_owned(), "5".into());
    }
    assert_eq!(fingerprint(&config), digits);
    assert_eq!(cache_fingerprint(&config), of_cache);
    // The size of the vocabulary is the one key between the two.
    if let Some(config) = config.as_object_mut() {
        config.remove("vocab_size");
    }
    assert_eq!(cache_fingerprint(&config), of_cache);
    assert_eq!(fingerprint(&config), of_cache);
}
