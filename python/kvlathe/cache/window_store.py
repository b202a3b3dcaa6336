"""Stores of a sliding window: they forget what no later query sees; positions go on counting.

A query sees ``sliding_window`` tokens, its own included, so ``sliding_window - 1`` past tokens are all that a later
call can need. Older ones are dropped; blocks leave whole, and native memory drops other tokens sixteen at a time, so
that up to a block less one, or fifteen, stay.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .layer_store import LayerStore, Policy
from .native_store import NativeStore
from .torch_store import TorchStore


class WindowStore(LayerStore, Protocol):
    """What a `WindowLayer` needs of a store."""

    @property
    def first(self) -> int:
        """Position from which on both sides are held."""

    def forget(self) -> None:
        """Drop what no later query can see."""

    def slide(self) -> None:
        """`forget`, then `compress`: nobody codes what is out of sight."""


class NativeWindowStore(NativeStore):
    """A `NativeStore` that forgets what has left the window."""

    def __init__(
        self,
        key_codec: object,
        value_codec: object,
        policy: Policy,
        keys: Tensor,
        values: Tensor,
        sliding_window: int,
    ) -> None:
        super().__init__(key_codec, value_codec, policy, keys, values)
        self._window = sliding_window

    @property
    def first(self) -> int:
        return self._layer.first

    def forget(self) -> None:
        self._layer.forget_before(self._first_seen(self.n_tokens))

    def slide(self) -> None:
        self._layer.slide(self._first_seen(self.n_tokens), torch.get_num_threads())


class TorchWindowStore(TorchStore):
    """A `TorchStore` that forgets what has left the window."""

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        keys: Tensor,
        values: Tensor,
        sliding_window: int,
    ) -> None:
        super().__init__(k_compressor, v_compressor, policy, keys, values)
        self._n_past = sliding_window - 1

    @property
    def first(self) -> int:
        return max(side.first for side in self._sides)

    def forget(self) -> None:
        with self._both_or_none() as sides:
            for side in sides:
                side.forget_before(self.n_tokens - self._n_past)

    def slide(self) -> None:
        self.forget()
        self.compress()

    def read(self, room: int = 0) -> tuple[Tensor, Tensor]:
        """The visible past, [B, H, min(n_tokens, sliding_window - 1) + room, D]."""
        length = min(self.n_tokens, self._n_past) + room
        keys, values = super().read(room)
        return keys[:, :, keys.shape[2] - length :], values[:, :, values.shape[2] - length :]
