"""Which weights a model has: what its keys and values depend on beside the config, as one hash.

Two fine-tunes with one config have equal fingerprints, and must not read one another's caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._native import cache_fingerprint
from .errors import ModelError
from .given_model import transformers_model
from .preset import config_json

# Numbers of each tensor that are hashed: whoever trains or merges changes nearly all of a tensor.
_SAMPLE = 1024

# What adapters of PEFT say of themselves, a layer each.
_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

# Of each model that was asked for: how its tensors stood then, and what they hashed to.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def model_identity(model: nn.Module) -> str:
    """SHA-256, 64 hex digits, over the config's fingerprint, a sample of every parameter and every stored buffer, and
    which adapters are active. Made once a model, and again when its tensors have changed.

    Raises:
        ModelError: weights that are not there, on the meta device for example.
    """
    inner = transformers_model(model)
    tensors, adapters = dict(_stored_tensors(inner)), list(_adapters(inner))
    stamp = [(name, id(each), each.data_ptr(), _version(each)) for name, each in tensors.items()]
    known = _KNOWN.get(inner)
    if known is not None and known[0] == (stamp, adapters):
        return known[1]
    hashed = hashlib.sha256(b"kvlathe model identity 1\n")
    hashed.update(cache_fingerprint(config_json(inner.config)).encode())
    for line in adapters:
        hashed.update(f"\n{line}".encode())
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"{name} of the model is on the meta device, so nobody can say which weights these are; load the "
                f"model without offloading, or leave the model out"
            )
        hashed.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(_sample(tensor))
    identity = hashed.hexdigest()
    _KNOWN[inner] = (stamp, adapters), identity
    return identity


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has. Other buffers follow from the config, and may change from call to call (RoPE)."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _adapters(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        told = {
            key: getattr(module, key, None)
            for key in _ADAPTER_STATE
            if hasattr(type(module), key) or key in vars(module)
        }
        told = {key: value for key, value in told.items() if not callable(value)}
        if told:
            yield f"{name}: {told}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLE)
    return flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
