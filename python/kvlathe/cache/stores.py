"""Which store serves a layer: the native one on the CPU where it can, torch tensors elsewhere."""

from __future__ import annotations

from torch import Tensor, nn

from ..compressors import NATIVE_DTYPES, native_codec
from .layer_store import LayerStore, Policy
from .native_store import NativeStore
from .torch_store import TorchStore


def make_store(
    k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
) -> LayerStore:
    """An empty store for tensors like ``keys`` and ``values``."""
    key_codec, value_codec = native_codec(k_compressor), native_codec(v_compressor)
    on_cpu = keys.device.type == "cpu" and keys.dtype in NATIVE_DTYPES
    if on_cpu and key_codec is not False and value_codec is not False:
        return NativeStore(key_codec, value_codec, policy, keys, values)
    return TorchStore(k_compressor, v_compressor, policy, keys, values)
