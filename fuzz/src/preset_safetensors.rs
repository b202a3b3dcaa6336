//! Presets as safetensors. The input is three parts, with line feeds between: the metadata as JSON, the header without
//! it, and the data of the tensors. They are put together as a writer would, so that lengths and quotation marks are
//! right and damage reaches what is behind them. An input without line feeds is the file itself.

use serde_json::Value;

use crate::preset;

/// Reads a file.
pub(crate) fn run(bytes: &[u8]) {
    let file = assemble(bytes);
    if let Some(preset) = preset::read(file.as_deref().unwrap_or(bytes)) {
        preset::check(&preset);
    }
}

fn assemble(parts: &[u8]) -> Option<Vec<u8>> {
    let mut parts = parts.splitn(3, |&byte| byte == b'\n');
    let metadata = Value::from(String::from_utf8_lossy(parts.next()?));
    let tensors = String::from_utf8_lossy(parts.next()?);
    let data = parts.next()?;
    // `tensors` begins with its brace, and an empty one has no comma after ours.
    let tensors = tensors.strip_prefix('{').unwrap_or(&tensors);
    let comma = if tensors == "}" { "" } else { "," };
    let header = format!(r#"{{"__metadata__":{{"kvlathe":{metadata}}}{comma}{tensors}"#);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    Some(file)
}
