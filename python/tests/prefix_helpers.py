"""Stores of prefixes for tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache_helpers import model_of, preset_of
from kvlathe import CompressedDynamicCache, PrefixStore

CHUNK = 16


def store_of(url: str, name: str = "llama", **options: Any) -> PrefixStore:
    """One of short chunks, which leaves nothing to the model and raises what goes wrong."""
    options = {"chunk_len": CHUNK, "uncompressed_tail": 0, "strict": True, "timeout_s": 20.0, **options}
    return PrefixStore(url, preset_of(name), model=model_of(name), **options)


def filled(name: str, ids: Tensor) -> CompressedDynamicCache:
    """A cache that has read these tokens; windows keep their beginning, as `PrefixStore.generate` sees to."""
    cache = CompressedDynamicCache.from_preset(preset_of(name), model=model_of(name), uncompressed_tail=0)
    if any(layer.is_sliding for layer in cache.layers):
        cache.activate_past_recording()
    with torch.no_grad():
        model_of(name)(input_ids=ids, past_key_values=cache)
    return cache
