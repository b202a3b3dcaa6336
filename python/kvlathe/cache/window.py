"""A layer with sliding-window attention: it holds its window and nothing older, coded like any other layer.

A query of such a layer sees ``sliding_window`` tokens, its own included, so ``sliding_window - 1`` past tokens are
all that a later call can need. Older ones are dropped, coded ones in whole blocks, which leaves up to a block less one
more. Sinks stay exact as long as they are in the window, and leave it like all others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import RollbackError, ShapeError
from .layer import CompressedLayer
from .layer_store import LayerStore, Policy
from .torch_store import TorchStore


class WindowStore(TorchStore):
    """A `TorchStore` that forgets what has left the window; positions go on counting."""

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
        # While tokens may still be rolled back, nothing that a shorter sequence would see may go.
        self.keeps_all = False

    @property
    def first(self) -> int:
        """Position from which on both sides are held."""
        return max(side.first for side in self._sides)

    def compress(self) -> None:
        # First what is out of sight, so that nobody codes it.
        if not self.keeps_all:
            self.forget()
        super().compress()

    def forget(self) -> None:
        """Drop what no later query can see."""
        with self._both_or_none() as sides:
            for side in sides:
                side.forget_before(self.n_tokens - self._n_past)

    def read(self, room: int = 0) -> tuple[Tensor, Tensor]:
        """The visible past, [B, H, min(n_tokens, sliding_window - 1) + room, D]."""
        length = min(self.n_tokens, self._n_past) + room
        keys, values = super().read(room)
        return keys[:, :, keys.shape[2] - length :], values[:, :, values.shape[2] - length :]


class WindowLayer(CompressedLayer):
    """A `CompressedLayer` that holds a sliding window.

    Its attention is always the model's own, over the expanded window: `attach` leaves it alone.

    Args:
        k_compressor, v_compressor, policy, device: as for `CompressedLayer`.
        sliding_window: tokens that a query sees, its own included.

    Raises:
        ShapeError: a window without a token.
    """

    is_sliding = True

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        sliding_window: int,
        device: Any = None,
    ) -> None:
        if sliding_window < 1:
            raise ShapeError(f"sliding_window is {sliding_window}, expected at least 1 token")
        self.sliding_window = sliding_window
        super().__init__(k_compressor, v_compressor, policy, device)

    def _new_store(self, key_states: Tensor, value_states: Tensor) -> LayerStore:
        store = WindowStore(
            self._k_compressor,
            self._v_compressor,
            self.policy,
            key_states,
            value_states,
            self.sliding_window,
        )
        store.keeps_all = self.record_past
        return store

    def _n_visible(self, n_tokens: int) -> int:
        """Past tokens, of so many, that the next query sees."""
        return min(n_tokens, self.sliding_window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        n_tokens = self.get_seq_length()
        visible = self._n_visible(n_tokens)
        return visible + query_length, n_tokens - visible

    def get_max_length(self) -> int:
        return self.sliding_window

    def values_held(self) -> tuple[int, int]:
        store = self._store
        if store is None:
            return 0, 0
        n = self._form.values_per_token * self._n_visible(store.n_tokens) * store.batch
        return n, n * self.dtype.itemsize

    def activate_past_recording(self) -> None:
        """Keep all tokens until `crop` says which of them stay (assisted decoding)."""
        super().activate_past_recording()
        store = self._store
        if isinstance(store, WindowStore):
            store.keeps_all = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse a `crop` after which the window would lack tokens.

        Raises:
            ShapeError: a positive number.
            RollbackError: tokens that would be in the window again have been dropped.
        """
        super().check_crop(tokens_to_remove)
        store = self._store
        if not isinstance(store, WindowStore):
            return
        n_left = store.n_tokens + tokens_to_remove
        if n_left > 0 and max(0, n_left - self.sliding_window + 1) < store.first:
            raise RollbackError(
                f"crop({tokens_to_remove}) would leave {n_left} tokens, but this layer's window of "
                f"{self.sliding_window} has dropped the first {store.first} tokens already; call "
                f"activate_past_recording() before the tokens that may be removed, or reset() and start again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        store = self._store
        if store is None:
            return
        if -tokens_to_remove >= store.n_tokens:
            # Nothing is left, so nothing is missed either.
            recorded = self.record_past
            self.reset()
            self.record_past = recorded
            return
        super().crop(tokens_to_remove)
        if isinstance(store, WindowStore):
            store.forget()
