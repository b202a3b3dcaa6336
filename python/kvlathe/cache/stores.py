"""Which store serves a layer: the native one on the CPU where it can, torch tensors elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..compressors import NATIVE_DTYPES, native_codec
from .layer_store import LayerStore, Policy
from .native_store import NativeStore
from .torch_store import TorchStore
from .window_store import NativeWindowStore, TorchWindowStore, WindowStore


def make_store(
    k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
) -> LayerStore:
    """An empty store for tensors like ``keys`` and ``values``."""
    codecs = _native_codecs(k_compressor, v_compressor, keys)
    if codecs is not None:
        return NativeStore(*codecs, policy, keys, values)
    return TorchStore(k_compressor, v_compressor, policy, keys, values)


def make_window_store(
    k_compressor: nn.Module,
    v_compressor: nn.Module,
    policy: Policy,
    keys: Tensor,
    values: Tensor,
    sliding_window: int,
) -> WindowStore:
    """As `make_store`, for a layer whose queries see ``sliding_window`` tokens, their own included."""
    codecs = _native_codecs(k_compressor, v_compressor, keys)
    if codecs is not None:
        return NativeWindowStore(*codecs, policy, keys, values, sliding_window)
    return TorchWindowStore(k_compressor, v_compressor, policy, keys, values, sliding_window)


def _native_codecs(k_compressor: nn.Module, v_compressor: nn.Module, keys: Tensor) -> tuple[Any, Any] | None:
    """Of both sides (None: exact), if the native cache can hold tensors like ``keys`` coded that way."""
    codecs = native_codec(k_compressor), native_codec(v_compressor)
    on_cpu = keys.device.type == "cpu" and keys.dtype in NATIVE_DTYPES
    return codecs if on_cpu and False not in codecs else None
