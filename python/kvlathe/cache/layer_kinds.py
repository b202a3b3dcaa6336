"""Which kind of cache layer serves each layer of a model, read from the model's config.

transformers decides: the layers that ``DynamicCache(config=...)`` would make are taken as they are, except those
that hold ordinary keys and values. Full attention becomes a `CompressedLayer`, a sliding or chunked window one
with a window; one that has a state of linear attention as well, a `CompressedMixedLayer`. What is left keeps
transformers' own layer and is not compressed: states of linear attention and convolutions, layers without a cache,
sparse-attention indexes, and the latents of multi-head latent attention, which the model has compressed already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError, PicklingError, PresetError, ShapeError
from ..preset import Preset
from ..saved import by_maker, maker

# transformers' layers with keys and values and a state of linear attention beside them; older ones have the first only.
_MIXED = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
    if hasattr(cache_utils, name)
)


@dataclass(frozen=True)
class LayerKind:
    """What serves one layer.

    Attributes:
        sliding_window: tokens that a query sees, its own included; None for full attention.
        stock: transformers' own layer, to be used as it is; None where we code keys and values and there is nothing
            else.
        n_states: of linear attention and convolutions beside keys and values that we code, in one layer.
    """

    sliding_window: int | None = None
    stock: Any = None
    n_states: int = 0

    @property
    def is_coded(self) -> bool:
        """Whether we hold the layer's keys and values."""
        return self.stock is None


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
    stock = stock_layers(config)
    if len(stock) != num_layers:
        raise ShapeError(
            f"num_layers is {num_layers}, but the config of {text_config.model_type!r} has {len(stock)} layers with a "
            f"cache; pass num_layers={len(stock)} and a compressor for each"
        )
    if getattr(text_config, "kv_lora_rank", None):
        return [LayerKind(stock=layer) for layer in stock]
    return [_kind(layer) for layer in stock]


def stock_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of the cache that transformers would make for a model with this config.

    Raises:
        ModelError: a layer type for which the installed transformers has no dynamic cache layer.
    """
    try:
        return DynamicCache(config=config).layers
    except KeyError as error:
        raise ModelError(
            f"{config.get_text_config(decoder=True).model_type!r} has layers of type {error}, for which the installed "
            f"transformers has no growing cache; use the cache that this model makes for itself"
        ) from error


def _kind(layer: Any) -> LayerKind:
    # Exactly these classes: their subclasses hold more than keys and values.
    if type(layer) is DynamicLayer:
        return LayerKind()
    if type(layer) is DynamicSlidingWindowLayer:
        return LayerKind(sliding_window=int(layer.sliding_window))
    if type(layer) in _MIXED:
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        return LayerKind(sliding_window=window, n_states=int(layer.number_of_states))
    return LayerKind(stock=layer)


class Stock:
    """One of transformers' own layers, for a file: by the name of its class, which is looked up among those that
    transformers makes caches of.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self._layer)
        return by_maker("stock layer", kind.__module__, kind.__qualname__, vars(self._layer))


@maker("stock layer")
def _stock(module: str, name: str, state: dict[str, Any]) -> Any:
    for kind in DYNAMIC_LAYER_TYPE_MAPPING.values():
        if (kind.__module__, kind.__qualname__) == (module, name):
            layer: Any = object.__new__(kind)
            layer.__dict__.update(state)
            return layer
    raise PicklingError(
        f"the file holds a layer of the class {name}, of which the installed transformers makes no caches; import "
        f"{module} first, or load it with the transformers that it was written with"
    )


def holds_recurrent_state(layer: Any) -> bool:
    """Whether one of transformers' own layers holds a state in which all tokens are summed up."""
    return any(getattr(layer, "is_recurrent_states_initialized", {}).values())


def holds_state(layer: Any) -> bool:
    """Whether a layer holds a state of any kind, a convolution's or a recurrent one."""
    return next(_states(layer), None) is not None


def n_state_rows(layer: Any) -> int:
    """Rows of the batch in a layer that holds a state."""
    return int(next(_states(layer)).shape[0])


def _states(layer: Any) -> Iterator[Tensor]:
    held = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
    return (state for states in held for state in states.values() if state is not None)


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


def check_kinds(preset: Preset, config: PreTrainedConfig) -> None:
    """Refuse a preset that codes layers in which the model keeps something else than keys and values.

    Raises:
        PresetError: with such layers.
    """
    kinds = layer_kinds(config, preset.n_layers)
    if others := [layer for layer in preset.coded_layers if not kinds[layer].is_coded]:
        raise PresetError(
            f"the preset of {preset.meta['model']} codes keys and values of layers {others}, where this model keeps "
            f"something else; use the preset of this model"
        )
