//! Damaged and hostile files: always an answer, never a panic, and no memory for sizes that are only claimed.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::LazyLock;

use common::{sample, seed_sample, tree};
use kvlathe_preset::{MAX_HEAD_DIM, MAX_LAYERS, Preset, PresetError};
use proptest::prelude::*;

/// Counts what each thread allocates, so that tests can run side by side.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is being torn down no longer counts.
        let _ = ALLOCATED.try_with(|total| total.set(total.get() + layout.size()));
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads a preset that must be refused, and returns why and how many bytes were allocated on the way.
fn refuse(bytes: &[u8]) -> (PresetError, usize) {
    let before = ALLOCATED.get();
    let result = Preset::from_bytes(bytes);
    (result.expect_err("this must be refused"), ALLOCATED.get() - before)
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn claimed_sizes_allocate_nothing() {
    let mut tree = tree(&sample(1, 1, 2, 1));
    tree["n_layers"] = MAX_LAYERS.into();
    tree["head_dim"] = MAX_HEAD_DIM.into();
    tree["rank"] = MAX_HEAD_DIM.into();
    tree["n_heads"] = 1024.into();
    tree["kvlathe"]["n_kv_heads"] = 1024.into();
    let small = 64 << 10;
    let (error, allocated) = refuse(tree.to_string().as_bytes());
    assert!(matches!(error, PresetError::Invalid { .. }), "{error}");
    assert!(allocated < small, "{allocated} bytes");

    // The same claims in the other container, with a rope for each of the 4096 layers.
    tree.as_object_mut().unwrap().remove("layers");
    tree["layer_rope"] = vec![serde_json::Value::Null; MAX_LAYERS].into();
    let header = serde_json::json!({"__metadata__": {"kvlathe": tree.to_string()}}).to_string();
    let (error, allocated) = refuse(&safetensors(&header, &[]));
    assert!(matches!(error, PresetError::MissingKey { .. }), "{error}");
    assert!(allocated < 32 * header.len(), "{allocated} bytes for a header of {}", header.len());

    for length in [u64::MAX, 1 << 63, 1 << 40, 99_999_999] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{\"a\":{\"dtype\":\"F32\",\"shape\":[1000000000000],\"data_offsets\":[0,4]}}");
        let (error, allocated) = refuse(&bytes);
        assert!(matches!(error, PresetError::Safetensors { .. }), "{error}");
        assert!(allocated < small, "{allocated} bytes");
    }
    for shape in ["[4000000000,4000000000,4000000000]", "[1000000000000]"] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        let (error, allocated) = refuse(&safetensors(&header, &[0; 4]));
        assert!(matches!(error, PresetError::Safetensors { .. }), "{error}");
        assert!(allocated < small, "{allocated} bytes");
    }
}

/// Text that takes 3 bytes an element and far more in memory stops at the limits of the format.
#[test]
fn short_text_does_not_become_much_memory() {
    let many = |element: &str| vec![element; 1 << 20].join(",");
    for (before, element, after) in [
        ("{\"layers\":[", "{}", "]}"),
        ("{\"layer_rope\":[", "null", "]}"),
        ("{\"layers\":[{\"K\":{\"U\":[", "[]", "]}}]}"),
        ("{\"layers\":[{\"K\":{\"U\":[[", "0", "]]}}]}"),
        ("{\"layers\":[{\"K\":{\"mean\":[", "0", "]}}]}"),
        ("{\"layers\":[{\"K\":{\"streams\":[", "{}", "]}}]}"),
        ("{\"layers\":[{\"K\":{\"streams\":[{\"widths\":[", "0", "]}]}}]}"),
        ("{\"kvlathe\":{\"rope\":[{\"inv_freq\":[", "0", "]}]}}"),
    ] {
        let text = format!("{before}{}{after}", many(element));
        let (error, allocated) = refuse(text.as_bytes());
        assert!(matches!(error, PresetError::Json { .. }), "{error}");
        assert!(allocated < 2 << 20, "{before}: {allocated} bytes");
    }
    let text = format!("{{\"kvlathe\":{{\"calibration\":{{\"a\":[{}]}}}}}}", vec!["[]"; 6 << 20].join(","));
    let (error, allocated) = refuse(text.as_bytes());
    assert!(error.to_string().contains("are allowed"), "{error}");
    assert!(allocated < 64 << 10, "{allocated} bytes");
}

static FILES: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| {
    let (lathe, seed) = (sample(2, 2, 4, 2), seed_sample());
    [
        lathe.to_json_string().unwrap().into_bytes(),
        lathe.to_safetensors_bytes().unwrap(),
        seed.to_json_string().unwrap().into_bytes(),
        seed.to_safetensors_bytes().unwrap(),
    ]
});

#[test]
fn every_truncation_is_refused() {
    for file in FILES.iter() {
        // The JSON's last byte is a line feed, and does without.
        for len in 0..file.len() - 1 {
            assert!(Preset::from_bytes(&file[..len]).is_err(), "{len} of {} bytes", file.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is accepted after damage is valid and can be written again.
    #[test]
    fn damage_never_panics(
        which in 0..4_usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = FILES[which].clone();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(preset) = Preset::from_bytes(&bytes) {
            prop_assert!(preset.validate().is_ok());
        }
    }

    /// Damage to structure rather than to bytes: digits for digits, brackets for brackets.
    #[test]
    fn swapped_pieces_never_panic(
        which in 0..4_usize,
        a in any::<prop::sample::Index>(),
        b in any::<prop::sample::Index>(),
        len in 1..40_usize,
    ) {
        let mut bytes = FILES[which].clone();
        let (a, b) = (a.index(bytes.len() - len), b.index(bytes.len() - len));
        bytes.copy_within(a..a + len, b);
        if let Ok(preset) = Preset::from_bytes(&bytes) {
            prop_assert!(preset.validate().is_ok());
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Preset::from_bytes(&bytes);
        let _ = Preset::from_bytes(&safetensors(&String::from_utf8_lossy(&bytes), &[]));
    }
}
