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

from ._moved import new_path, redirect_imports
from ._native import version as _version
from ._requirements import check_transformers
from .errors import (
    AttachWarning,
    BlockError,
    BudgetError,
    CacheStateError,
    CalibrationError,
    CalibrationWarning,
    ContainerError,
    CorpusError,
    DeviceError,
    DtypeError,
    ExpandedWarning,
    GradientError,
    KvlatheError,
    ModelError,
    NonFiniteError,
    PaddingWarning,
    PicklingError,
    PrefixStoreError,
    PrefixStoreWarning,
    PresetError,
    ResourceError,
    RollbackError,
    ShapeError,
    UnverifiedPresetWarning,
)
from .preset import Preset
from .saved import tell_torch

if TYPE_CHECKING:
    from .attachment import attach, detach
    from .cache import CompressedDynamicCache, load_preset_cache
    from .calibration.basis import CalibrationOptions, calibrate
    from .calibration.quality import Evaluator, Quality
    from .calibration.text.corpus import Corpus, corpus_from_files, default_corpus
    from .calibration.tuning import TuneOptions, TuneResult, tune
    from .calibration.verification import Verdict, verify
    from .compressors import IdentityCompressor, QuantizedCalibratedCompressor, StreamSetCompressor
    from .model_loading import load_model
    from .prefixes import PrefixStore
    from .stores import Block, LayerParts, SideParts

__version__ = _version()

redirect_imports()
tell_torch()

# Where each name lives; importing it needs torch and transformers.
_LAZY = {
    "Block": "stores",
    "CalibrationOptions": "calibration.basis",
    "CompressedDynamicCache": "cache",
    "Corpus": "calibration.text.corpus",
    "Evaluator": "calibration.quality",
    "IdentityCompressor": "compressors",
    "LayerParts": "stores",
    "PrefixStore": "prefixes",
    "Quality": "calibration.quality",
    "QuantizedCalibratedCompressor": "compressors",
    "SideParts": "stores",
    "StreamSetCompressor": "compressors",
    "TuneOptions": "calibration.tuning",
    "TuneResult": "calibration.tuning",
    "Verdict": "calibration.verification",
    "attach": "attachment",
    "calibrate": "calibration.basis",
    "corpus_from_files": "calibration.text.corpus",
    "default_corpus": "calibration.text.corpus",
    "detach": "attachment",
    "load_model": "model_loading",
    "load_preset_cache": "cache",
    "tune": "calibration.tuning",
    "verify": "calibration.verification",
}

__all__ = [
    "AttachWarning",
    "Block",
    "BlockError",
    "BudgetError",
    "CacheStateError",
    "CalibrationError",
    "CalibrationOptions",
    "CalibrationWarning",
    "CompressedDynamicCache",
    "ContainerError",
    "Corpus",
    "CorpusError",
    "DeviceError",
    "DtypeError",
    "Evaluator",
    "ExpandedWarning",
    "GradientError",
    "IdentityCompressor",
    "KvlatheError",
    "LayerParts",
    "ModelError",
    "NonFiniteError",
    "PaddingWarning",
    "PicklingError",
    "PrefixStore",
    "PrefixStoreError",
    "PrefixStoreWarning",
    "Preset",
    "PresetError",
    "Quality",
    "QuantizedCalibratedCompressor",
    "ResourceError",
    "RollbackError",
    "ShapeError",
    "SideParts",
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
    if new_path(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'kvlathe' has no attribute {name!r}")
    check_transformers()
    try:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("torch", "transformers"):
            raise ImportError(
                f"kvlathe.{name} needs {package}; install it with: pip install 'kvlathe[torch]'"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
