"""Which weights a server's model has, from its files: two fine-tunes of one name must not read one another's pages."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import ModelError

_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")

# Of each file: so many pieces of so many bytes are hashed.
_N_PIECES = 64
_PIECE_BYTES = 4096


def weights_identity(model: str) -> str:
    """SHA-256, 64 hex digits, over the names, sizes and samples of a model's files, its config among them.

    Args:
        model: a folder, a file, or the name of a model that lies in Hugging Face's own cache.

    Raises:
        ModelError: no files of that model on this machine.
    """
    folder = _folder(model)
    files = [folder] if folder.is_file() else sorted({path for kind in _KINDS for path in folder.glob(kind)})
    if not files:
        raise ModelError(
            f"no weights of {model} in {folder}, so nobody can say which ones a stored page belongs to; give the tier "
            f'an identity of them: {{"weights": "…"}}'
        )
    hashed = hashlib.sha256(b"kvlathe identity of a model's files 1\n")
    config = folder / "config.json"
    if config.is_file():
        hashed.update(config.read_bytes())
    for path in files:
        hashed.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        hashed.update(_sample(path))
    return hashed.hexdigest()


def _folder(model: str) -> Path:
    if os.path.exists(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} is no folder and not in Hugging Face's cache on this machine, so nobody can say which weights a "
            f'stored page belongs to; give the tier an identity of them: {{"weights": "…"}}'
        ) from error


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    step = max(_PIECE_BYTES, size // _N_PIECES)
    pieces = []
    with path.open("rb") as file:
        for offset in range(0, size, step):
            file.seek(offset)
            pieces.append(file.read(_PIECE_BYTES))
    return b"".join(pieces)
