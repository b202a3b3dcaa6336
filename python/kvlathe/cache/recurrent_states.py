"""States of linear attention and convolutions, which hybrid models keep in the same cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ..errors import ModelError, RollbackError
from .layer import CompressedLayer
from .layer_kinds import holds_recurrent_state, holds_state, n_state_rows


class RecurrentStates(DynamicCache):
    """What `CompressedDynamicCache` does with such states: transformers' own layers hold them, ours refuse."""

    # CompressedLayer, or where the config says so one of transformers' own.
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

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether it has no keys and values; see `DynamicCache`."""
        linear = super().is_linear
        return [
            each and not isinstance(layer, CompressedLayer)
            for each, layer in zip(linear, self.layers, strict=True)
        ]

    def _check_states_crop(self, tokens_to_remove: int, n_removed: int) -> None:
        """Refuse what states could not do, before any layer has been changed.

        Args:
            n_removed: tokens that are to go; those of a pass that was cut short count as well.

        Raises:
            RollbackError: a recurrent state, which has no way back, or a convolution's, unless it records its past.
        """
        for index, layer in enumerate(self.layers):
            if n_removed and holds_recurrent_state(layer):
                raise RollbackError(
                    f"crop({tokens_to_remove}): layer {index} keeps a recurrent state, from which no token can be "
                    f"removed; copy the cache before tokens that may be removed, or reset() and start again"
                )
            if holds_state(layer) and not layer.record_past:
                raise RollbackError(
                    f"crop({tokens_to_remove}): layer {index} keeps a state of a convolution and does not track past "
                    f"states; call activate_past_recording() before the tokens that may be removed"
                )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, also of states; see `DynamicCache`."""
        for layer in self.layers:
            if hasattr(layer, "batch_repeat_interleave"):
                layer.batch_repeat_interleave(repeats)
            elif holds_state(layer):
                layer.reorder_cache(torch.arange(n_state_rows(layer)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `reorder_cache`, also of states; see `DynamicCache`."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            elif holds_state(layer):
                layer.reorder_cache(torch.arange(n_state_rows(layer))[indices.cpu()])

    def _require_states(self, layer_idx: int | None) -> None:
        asked = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        if all(type(layer) is CompressedLayer for layer in asked):
            which = "the model" if layer_idx is None else f"layer {layer_idx} of the model"
            raise ModelError(
                f"{which} keeps a state of linear attention or of a convolution, which this cache has no place for; "
                f"make the cache with config=model.config (or from_preset(preset, model=model))"
            )
