"""Which store serves a layer: the native one on the CPU where it can, torch tensors elsewhere."""

from __future__ import annotations

from torch import Tensor, nn

from ..compressors import NATIVE_DTYPES, IdentityCompressor, StreamSetCompressor
from .foreign import ForeignStore
from .native import NativeStore
from .store import Policy, Store


def make_store(
    k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
) -> Store:
    """An empty store for tensors like ``keys`` and ``values``."""
    # Subclasses may compute something else, so only the classes themselves qualify.
    native = all(
        type(each) in (IdentityCompressor, StreamSetCompressor) for each in (k_compressor, v_compressor)
    )
    on_cpu = keys.device.type == "cpu"
    if native and on_cpu and keys.dtype in NATIVE_DTYPES:
        codecs = getattr(k_compressor, "native", None), getattr(v_compressor, "native", None)
        return NativeStore(*codecs, policy, keys, values)
    why = None
    if not on_cpu and all(isinstance(each, StreamSetCompressor) for each in (k_compressor, v_compressor)):
        why = f"its tokens are on {keys.device}, and packed tokens are attended to on the CPU only"
    return ForeignStore(k_compressor, v_compressor, policy, keys, values, why_expanded=why)
