"""Saved caches and layers, made again from data that nobody has checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from ..counts import is_count
from ..errors import DeviceError, DtypeError, PicklingError, ShapeError
from ..saved import maker
from ..stores import LayerParts, Policy
from .builder import check_compressor
from .dynamic_cache import CompressedDynamicCache
from .layer import CompressedLayer
from .mixed_layer import CompressedMixedLayer
from .padding import PaddedRows


def _kind(given: Any, ours: type) -> Any:
    """The class of a saved cache or layer: ours if none is given, else a user's."""
    if given is None:
        return ours
    if not (isinstance(given, type) and issubclass(given, ours)):
        raise PicklingError(f"the file holds {given!r} where a {ours.__name__} belongs; save the cache again")
    return given


@maker("cache")
def _cache(given: Any, layers: list[Any], state: dict[str, Any]) -> CompressedDynamicCache:
    cache: CompressedDynamicCache = object.__new__(_kind(given, CompressedDynamicCache))
    if not layers or not all(callable(getattr(layer, "reset", None)) for layer in layers):
        raise PicklingError("the file holds something else where layers belong; save the cache again")
    for name in ("compress_start_len", "uncompressed_tail"):
        if not is_count(state.get(name)):
            raise ShapeError(
                f"{name} is {state.get(name)!r}, expected a whole number, at least 0; save the cache again"
            )
    # With what another release of transformers may want.
    ours = {"layers": list(layers), "layer_class_to_replicate": None}
    cache.__setstate__({**vars(DynamicCache()), **state, **ours})
    return cache


@maker("layer")
def _layer(given: Any, *of_the_layer: Any) -> CompressedLayer:
    return _filled(_kind(given, CompressedLayer), *of_the_layer)


@maker("mixed layer")
def _mixed_layer(of_the_layer: list[Any], states: dict[str, Any]) -> CompressedLayer:
    n_states = states["number_of_states"]
    if not is_count(n_states) or not 0 < n_states <= len(states["conv_states"]):
        raise PicklingError(f"the file says that a layer has {n_states!r} states; save the cache again")

    def make(*arguments: Any) -> CompressedLayer:
        layer = CompressedMixedLayer(*arguments, n_states=n_states)
        vars(layer).update({name: states[name] for name in vars(LinearAttentionLayer(n_states))})
        return layer

    return _filled(make, *of_the_layer)


def _filled(
    make: Callable[..., CompressedLayer],
    k_compressor: nn.Module,
    v_compressor: nn.Module,
    policy: tuple[int, int, int, int | None],
    device: torch.device | None,
    contents: tuple[LayerParts, tuple[torch.dtype, torch.dtype]] | None,
    noted: tuple[bool, bool, bool, PaddedRows | None],
) -> CompressedLayer:
    """A layer that ``make`` makes empty, with what the file holds of it."""
    check_compressor("the keys' compressor", k_compressor)
    check_compressor("the values' compressor", v_compressor)
    if not (device is None or isinstance(device, torch.device)):
        raise DeviceError(
            f"the file names {device!r} as the cache's device, which is none; save the cache again"
        )
    if contents is not None and device is not None:
        # Wherever the file is loaded to.
        device = contents[0].key.tail.device
    layer = make(k_compressor, v_compressor, Policy(*policy), device)
    if contents is not None:
        parts, dtypes = contents
        layer.import_parts(parts)
        key_dtype, value_dtype = dtypes
        if torch.promote_types(key_dtype, value_dtype) != layer.form.dtype:
            raise DtypeError(
                f"the saved tokens are {layer.form.dtype}, and were given as {key_dtype} and {value_dtype}; save the "
                f"cache again"
            )
        layer.form = replace(layer.form, dtypes=(key_dtype, value_dtype))
    layer.record_past, layer._waits, layer._lost_graph, rows = noted
    if not (rows is None or isinstance(rows, PaddedRows)):
        raise ShapeError(
            f"padding was noted as a {type(rows).__name__}, expected PaddedRows; save the cache again"
        )
    layer.padding_noted = rows
    return layer
