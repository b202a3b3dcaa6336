"""A cache's layers, made of compressors and a model's config: one builder behind all ways to make a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..counts import is_count
from ..errors import PresetError, ShapeError
from ..stores import Policy
from .layer import CompressedLayer
from .layer_kinds import LayerKind, layer_kinds
from .mixed_layer import CompressedMixedLayer


def make_layers(
    k_compressors: Sequence[nn.Module],
    v_compressors: Sequence[nn.Module],
    num_layers: int,
    compress_start_len: int,
    uncompressed_tail: int,
    config: PreTrainedConfig | None,
    device: torch.device | None,
) -> list[Any]:
    """Layers as `CompressedDynamicCache` describes them; those that keep no keys and values are transformers' own.

    Raises:
        ShapeError, PresetError, ModelError: as `CompressedDynamicCache` does.
    """
    for name, given in (
        ("num_layers", num_layers),
        ("compress_start_len", compress_start_len),
        ("uncompressed_tail", uncompressed_tail),
    ):
        if not is_count(given) or given < (name == "num_layers"):
            least = 1 if name == "num_layers" else 0
            raise ShapeError(f"{name} is {given!r}, expected a whole number, at least {least}")
    for name, compressors in (("k_compressors", k_compressors), ("v_compressors", v_compressors)):
        if len(compressors) != num_layers:
            raise ShapeError(
                f"{name} has {len(compressors)} entries for num_layers={num_layers}; one a layer is needed"
            )
        for layer, compressor in enumerate(compressors):
            check_compressor(f"{name}[{layer}]", compressor)
    kinds = [LayerKind()] * num_layers if config is None else layer_kinds(config, num_layers)
    layers: list[Any] = []
    for kind, k_compressor, v_compressor in zip(kinds, k_compressors, v_compressors, strict=True):
        n_sinks = max(int(getattr(c, "n_sinks", 0)) for c in (k_compressor, v_compressor))
        policy = Policy(n_sinks, compress_start_len, uncompressed_tail, kind.sliding_window)
        if kind.stock is not None:
            layers.append(kind.stock)
        elif kind.n_states:
            layers.append(
                CompressedMixedLayer(k_compressor, v_compressor, policy, device, n_states=kind.n_states)
            )
        else:
            layers.append(CompressedLayer(k_compressor, v_compressor, policy, device))
    return layers


def check_compressor(name: str, given: object) -> None:
    """Refuse what is no compressor.

    Raises:
        PresetError
    """
    if not (callable(getattr(given, "compress", None)) and callable(getattr(given, "expand", None))):
        raise PresetError(
            f"{name} is a {type(given).__name__} without compress() and expand(); give an IdentityCompressor() where "
            f"nothing is to be coded"
        )
