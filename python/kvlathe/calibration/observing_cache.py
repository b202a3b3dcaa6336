"""A cache that keeps no keys and values: it tells who hands it which, for passes over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from ..cache.layer_kinds import stock_layers

OnUpdate = Callable[[int, Tensor, Tensor], None]


class ObservingCache(DynamicCache):
    """Gives keys and values back as they come. States of other kinds are kept, as the model asks for them again.

    Args:
        on_update: called with a layer's index, its keys and its values, in each `update`.

    Raises:
        ModelError: a config with layers for which transformers has no growing cache.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, on_update: OnUpdate) -> None:
        layers = stock_layers(config)
        super().__init__()
        self.layers = layers
        self.layer_class_to_replicate = None
        self._on_update = on_update

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._on_update(layer_idx, key_states, value_states)
        return key_states, value_states
