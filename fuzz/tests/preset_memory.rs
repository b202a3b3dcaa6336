//! Hostile presets: no memory for what is only claimed, and little for what is there.

use kvlathe::preset::{MAX_HEAD_DIM, MAX_LAYERS, Preset, PresetError};
use kvlathe_fuzz::allocation::peak_of;
use kvlathe_fuzz::most_bytes_for;
use serde_json::{Value, json};

/// Reads a preset that must be refused, and returns why and how many bytes were held at most.
fn refuse(bytes: &[u8]) -> (PresetError, usize) {
    let (result, peak) = peak_of(|| Preset::from_bytes(bytes));
    (result.expect_err("this must be refused"), peak)
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

/// The metadata of the largest model that there may be.
fn largest_claims() -> Value {
    json!({
        "model": "huge", "rank": MAX_HEAD_DIM, "head_dim": MAX_HEAD_DIM, "n_layers": MAX_LAYERS, "n_heads": 1024,
        "kvlathe": {"format_version": 2, "n_kv_heads": 4, "block_len": 256, "n_sinks": 0, "bits_per_value": 8},
    })
}

#[test]
fn claimed_sizes_allocate_nothing() {
    let small = 64 << 10;
    let mut tree = largest_claims();
    tree["layers"] = json!([{"K": {"U": [], "mean": [], "streams": []}}]);
    let (error, peak) = refuse(tree.to_string().as_bytes());
    assert!(matches!(error, PresetError::Invalid { .. }), "{error}");
    assert!(peak < small, "{peak} bytes");

    // The same claims in the other container.
    let mut tree = largest_claims();
    tree["layer_rope"] = vec![Value::Null; MAX_LAYERS].into();
    let header = json!({"__metadata__": {"kvlathe": tree.to_string()}}).to_string();
    let (error, peak) = refuse(&safetensors(&header, &[]));
    assert!(matches!(error, PresetError::MissingKey { .. }), "{error}");
    assert!(peak < 32 * header.len(), "{peak} bytes for a header of {}", header.len());

    for length in [u64::MAX, 1 << 63, 1 << 40, 99_999_999, 1000] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(br#"{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}"#);
        let (error, peak) = refuse(&bytes);
        assert!(matches!(error, PresetError::Safetensors { .. }), "{error}");
        assert!(peak < small, "{peak} bytes");
    }
}

/// Offsets that overlap, leave gaps, run backwards or past the end, and sizes that overflow: nothing is read outside the
/// file, and no byte twice.
#[test]
fn offsets_are_checked() {
    let tensor = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = tensor("[1]", 0, 4);
    for second in [
        tensor("[1]", 0, 4),
        tensor("[2]", 0, 8),
        tensor("[1]", 2, 6),
        tensor("[0]", 8, 4),
        tensor("[1]", 8, 12),
        tensor("[1]", 4, u64::MAX),
        tensor("[1]", u64::MAX - 3, u64::MAX),
        tensor("[1]", 4, 1 << 40),
        tensor("[1,1,1,1,1,1,1,1,1]", 4, 8),
        tensor("[4000000000,4000000000,4000000000]", 4, 8),
        tensor("[1000000000000]", 4, 8),
        tensor("[-1]", 4, 8),
        tensor("[1.5]", 4, 8),
        tensor("[1]", 4, 8).replace("\"dtype\"", "\"path\":\"/etc/passwd\",\"dtype\""),
    ] {
        let header = format!(r#"{{"a":{one},"b":{second}}}"#);
        let (error, _) = refuse(&safetensors(&header, &[0; 8]));
        assert!(matches!(error, PresetError::Safetensors { .. }), "{second}: {error}");
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
        ("{\"layers\":[{\"K\":{\"streams\":[{\"widths\":[", "0", "]}]}}]}"),
        ("{\"kvlathe\":{\"rope\":[{\"inv_freq\":[", "0", "]}]}}"),
        ("{\"kvlathe\":{\"measured\":{\"a\":[", "[]", "]}}}"),
    ] {
        let text = format!("{before}{}{after}", many(element));
        let (error, peak) = refuse(text.as_bytes());
        assert!(matches!(error, PresetError::Json { .. }), "{error}");
        assert!(peak < 2 << 20, "{before}: {peak} bytes");
    }
}

/// The most memory for a byte that we know how to get. The limit is the one that fuzzing holds every input against.
#[test]
fn memory_is_bounded_by_the_size_of_the_file() {
    let repeat = |element: &str, n| vec![element; n].join(",");
    let free = |element: &str| {
        let section = format!(r#"{{"a":[{}]}}"#, repeat(element, (1 << 20) / (element.len() + 1) - 16));
        format!(r#"{{"kvlathe":{{"calibration":{section},"measured":{section}}}}}"#)
    };
    let side = |streams: &str| format!(r#"{{"U":[[1]],"mean":[0],"streams":[{streams}]}}"#);
    let layers =
        |side: &str, n| format!(r#"{{"layers":[{}]}}"#, repeat(&format!(r#"{{"K":{side},"V":{side}}}"#), n));
    let empty = r#"{"mean":[],"basis":[],"importance":[],"widths":[]}"#;
    let tensor = r#"{"dtype":"U8","shape":[],"data_offsets":[0,0]}"#;
    let tensors: Vec<String> = (0..50_000).map(|i| format!(r#""{i:x}":{tensor}"#)).collect();
    let metadata: Vec<String> = (0..200_000).map(|i| format!(r#""{i:x}":"""#)).collect();
    let files = [
        ("free-form lists", free("[]").into_bytes()),
        ("free-form numbers", free("0").into_bytes()),
        ("free-form objects", free(r#"{"":0}"#).into_bytes()),
        ("empty streams", layers(&side(&repeat("{}", 1000)), 64).into_bytes()),
        ("streams of empty lists", layers(&side(&repeat(empty, 1000)), 16).into_bytes()),
        ("rows of one number", layers(&format!(r#"{{"U":[{}]}}"#, repeat("[0]", 1024)), 512).into_bytes()),
        ("rows of 513 numbers", layers(&format!(r#"{{"U":[[{}]]}}"#, repeat("0", 513)), 512).into_bytes()),
        ("empty sides", layers("{}", MAX_LAYERS).into_bytes()),
        ("depth", format!("{}{}", r#"{"a":"#.repeat(1 << 20), "}".repeat(1 << 20)).into_bytes()),
        ("deep lists", format!(r#"{{"kvlathe":{{"measured":{{"a":{}"#, "[".repeat(1 << 19)).into_bytes()),
        ("a long name", json!({ "model": "x".repeat(1 << 20) }).to_string().into_bytes()),
        ("small tensors", safetensors(&format!("{{{}}}", tensors.join(",")), &[])),
        ("small strings", safetensors(&format!(r#"{{"__metadata__":{{{}}}}}"#, metadata.join(",")), &[])),
        (
            "a long shape",
            safetensors(
                &format!(r#"{{"a":{}}}"#, tensor.replace("[]", &format!("[{}]", repeat("0", 1 << 20)))),
                &[],
            ),
        ),
        ("long unknown keys", safetensors(&format!(r#"{{"a":{{"b":[{}]}}}}"#, repeat("0", 1 << 20)), &[])),
        ("zeros", vec![0; 1 << 20]),
        ("braces", vec![b'{'; 1 << 20]),
    ];
    for (what, file) in files {
        let (error, peak) = refuse(&file);
        println!(
            "{what}: {} bytes, {peak} held, {:.1} a byte: {error:.60}",
            file.len(),
            peak as f64 / file.len() as f64
        );
        assert!(peak <= most_bytes_for(file.len()), "{what}: {peak} bytes for a file of {}", file.len());
    }
}
