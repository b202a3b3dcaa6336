"""kvlathe: compressed key/value caches for Hugging Face transformers.

Calibrated once per model, then used in place of `DynamicCache`::

    from kvlathe import load_preset_cache

    cache = load_preset_cache("my_preset.safetensors", num_layers=model.config.num_hidden_layers, device="cpu")
    model.generate(**inputs, past_key_values=cache)

Presets can be inspected without torch; everything else imports it on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._native import version as _version
from ._requirements import check_transformers
from .errors import (
    BudgetError,
    CacheStateError,
    CalibrationError,
    CorpusError,
    DeviceError,
    DtypeError,
    KvlatheError,
    ModelError,
    NonFiniteError,
    PaddingWarning,
    PicklingError,
    PresetError,
    ResourceError,
    RollbackError,
    ShapeError,
    UnverifiedPresetWarning,
)
from .preset import Preset

if TYPE_CHECKING:
    from .attachment import attach, detach
    from .cache import CompressedDynamicCache, load_preset_cache
    from .calibration import CalibrationOptions, calibrate
    from .compressors import IdentityCompressor, QuantizedCalibratedCompressor, StreamSetCompressor
    from .corpus import Corpus, corpus_from_files, default_corpus
    from .evaluation import Evaluator, Quality
    from .model_loading import load_model
    from .tuning import TuneOptions, TuneResult, tune
    from .verification import Verdict, verify

__version__ = _version()

# Where each name lives; importing it needs torch and transformers.
_LAZY = {
    "attach": "attachment",
    "detach": "attachment",
    "CalibrationOptions": "calibration",
    "CompressedDynamicCache": "cache",
    "Corpus": "corpus",
    "Evaluator": "evaluation",
    "IdentityCompressor": "compressors",
    "Quality": "evaluation",
    "QuantizedCalibratedCompressor": "compressors",
    "StreamSetCompressor": "compressors",
    "TuneOptions": "tuning",
    "TuneResult": "tuning",
    "Verdict": "verification",
    "calibrate": "calibration",
    "corpus_from_files": "corpus",
    "default_corpus": "corpus",
    "load_model": "model_loading",
    "load_preset_cache": "cache",
    "tune": "tuning",
    "verify": "verification",
}

__all__ = [
    "BudgetError",
    "CacheStateError",
    "CalibrationError",
    "CalibrationOptions",
    "CompressedDynamicCache",
    "Corpus",
    "CorpusError",
    "DeviceError",
    "DtypeError",
    "Evaluator",
    "IdentityCompressor",
    "KvlatheError",
    "ModelError",
    "NonFiniteError",
    "PaddingWarning",
    "PicklingError",
    "Preset",
    "PresetError",
    "Quality",
    "QuantizedCalibratedCompressor",
    "ResourceError",
    "RollbackError",
    "ShapeError",
    "StreamSetCompressor",
    "TuneOptions",
    "TuneResult",
    "UnverifiedPresetWarning",
    "Verdict",
    "__version__",
    "attach",
    "calibrate",
    "corpus_from_files",
    "default_corpus",
    "detach",
    "load_model",
    "load_preset_cache",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvlathe' has no attribute {name!r}")
    check_transformers()
    try:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            raise ImportError(
                f"kvlathe.{name} needs {error.name}; install it with: pip install 'kvlathe[torch]'"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
