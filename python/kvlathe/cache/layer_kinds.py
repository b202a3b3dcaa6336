"""Which kind of cache layer serves each layer of a model, read from the model's config.

transformers decides: the layers that ``DynamicCache(config=...)`` would make are taken as they are, except those
that hold ordinary keys and values. Full attention becomes a `CompressedLayer`, a sliding or chunked window a
`WindowLayer`. What is left keeps transformers' own layer and is not compressed: states of linear attention and
convolutions, layers without a cache, sparse-attention indexes, and the latents of multi-head latent attention, which
the model has compressed already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError, ShapeError


@dataclass(frozen=True)
class LayerKind:
    """What serves one layer.

    Attributes:
        sliding_window: tokens that a query sees, its own included; None for full attention.
        stock: transformers' own layer, to be used as it is; None where we code keys and values.
    """

    sliding_window: int | None = None
    stock: Any = None


def layer_kinds(config: PreTrainedConfig, num_layers: int) -> list[LayerKind]:
    """What serves each layer of a model with this config.

    Args:
        config: the model's; of a model with several parts, the text decoder's counts.
        num_layers: how many layers the cache is to have.

    Raises:
        ModelError: a layer type for which the installed transformers has no dynamic cache layer.
        ShapeError: a config with another number of layers.
    """
    text_config: Any = config.get_text_config(decoder=True)
    try:
        stock: list[Any] = DynamicCache(config=config).layers
    except KeyError as error:
        raise ModelError(
            f"{text_config.model_type!r} has layers of type {error}, for which the installed transformers has no "
            f"growing cache; use the cache that this model makes for itself"
        ) from error
    if len(stock) != num_layers:
        raise ShapeError(
            f"num_layers is {num_layers}, but the config of {text_config.model_type!r} has {len(stock)} layers with a "
            f"cache; pass num_layers={len(stock)} and a compressor for each"
        )
    if getattr(text_config, "kv_lora_rank", None):
        return [LayerKind(stock=layer) for layer in stock]
    return [_kind(layer) for layer in stock]


def _kind(layer: Any) -> LayerKind:
    # Exactly these classes: their subclasses hold more than keys and values.
    if type(layer) is DynamicLayer:
        return LayerKind()
    if type(layer) is DynamicSlidingWindowLayer:
        return LayerKind(sliding_window=int(layer.sliding_window))
    return LayerKind(stock=layer)


def holds_recurrent_state(layer: Any) -> bool:
    """Whether one of transformers' own layers holds a state in which all tokens are summed up."""
    return any(getattr(layer, "is_recurrent_states_initialized", {}).values())


def tensor_bytes(layer: Any) -> int:
    """Bytes of the tensors that one of transformers' own layers holds."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, held in vars(layer).items()
        if not name.startswith("_")
        for tensor in _tensors(held)
    )


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
