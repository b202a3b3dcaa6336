"""What the layers of a pass share; and telling a user, once a cache, that tokens had to be expanded, and why."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ..errors import ExpandedWarning
from ..lazy import PassMemo

if TYPE_CHECKING:
    from .layer import CompressedLayer


class Expansions:
    """Which layers of a cache were expanded in the latest pass through the model.

    Attributes:
        memo: of that pass.
    """

    def __init__(self) -> None:
        self._layers: set[int] = set()
        self._told = False
        self._unsettled: CompressedLayer | None = None
        self.memo = PassMemo()

    def begin_pass(self) -> None:
        """What follows is of another pass."""
        self.memo = PassMemo()
        if self._layers:
            self._layers = set()

    def settle_later(self, layer: CompressedLayer) -> None:
        """A layer's first tokens were read, and attention may still come: by the next layer's update it has."""
        self._unsettled = layer

    def begin_layer(self) -> None:
        """A layer is about to be updated."""
        if self._unsettled is not None:
            layer, self._unsettled = self._unsettled, None
            layer.settle()

    def add(self, layer_idx: int, reason: str | None) -> None:
        """A layer has been expanded.

        Args:
            reason: a sentence for the user, without its full stop; None where it could not be otherwise, and nothing
                is said.
        """
        self._layers.add(layer_idx)
        if reason is None or self._told:
            return
        self._told = True
        warnings.warn(
            f"layer {layer_idx} of this cache was expanded for the time of one call: {reason}. Results are right, but "
            f"each step takes longer than with the stock cache, and the longer the more tokens the cache holds "
            f"(get_memory_stats()['expanded_layers'] counts such layers)",
            ExpandedWarning,
            stacklevel=2,
        )

    @property
    def n_layers(self) -> int:
        """Layers expanded in the latest pass."""
        return len(self._layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expansions:
        twin = Expansions()
        twin._layers, twin._told = set(self._layers), self._told
        return twin
