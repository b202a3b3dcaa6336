"""States of linear attention and convolutions, which hybrid models keep in the same cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ..errors import ModelError
from .layer import CompressedLayer


class RecurrentStates(DynamicCache):
    """What `CompressedDynamicCache` does with such states: transformers' own layers hold them, ours refuse."""

    # CompressedLayer, WindowLayer, or where the config says so one of transformers' own.
    layers: list[Any]

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of linear attention has a state; see `DynamicCache`.

        Raises:
            ModelError: the cache was made without the model's config, so that no layer can hold such a state.
        """
        self._require_states(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """A convolution's state; see `DynamicCache` and `has_previous_state`."""
        self._require_states(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """A recurrent state; see `DynamicCache` and `has_previous_state`."""
        self._require_states(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Hand on a convolution's state; see `DynamicCache` and `has_previous_state`."""
        self._require_states(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Hand on a recurrent state; see `DynamicCache` and `has_previous_state`."""
        self._require_states(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _require_states(self, layer_idx: int | None) -> None:
        asked = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        if all(isinstance(layer, CompressedLayer) for layer in asked):
            which = "the model" if layer_idx is None else f"layer {layer_idx} of the model"
            raise ModelError(
                f"{which} keeps a state of linear attention or of a convolution, which this cache has no place for; "
                f"make the cache with config=model.config (or from_preset(preset, model=model))"
            )
