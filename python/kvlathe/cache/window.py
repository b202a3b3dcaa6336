"""A layer with sliding-window attention: it holds its window and nothing older, coded like any other layer.

Sinks stay exact as long as they are in the window, and leave it like all others.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..errors import RollbackError, ShapeError
from .layer import CompressedLayer
from .layer_store import LayerStore, Policy
from .stores import make_window_store
from .window_store import WindowStore


class WindowLayer(CompressedLayer):
    """A `CompressedLayer` that holds a sliding window.

    Args:
        k_compressor, v_compressor, policy, device: as for `CompressedLayer`.
        sliding_window: tokens that a query sees, its own included.

    Raises:
        ShapeError: a window without a token.
    """

    is_sliding = True
    _store: WindowStore | None

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

    def _new_store(self, key_states: Tensor, value_states: Tensor) -> WindowStore:
        return make_window_store(
            self._k_compressor,
            self._v_compressor,
            self.policy,
            key_states,
            value_states,
            self.sliding_window,
        )

    def _settle(self, store: LayerStore) -> None:
        cast(WindowStore, store).slide()

    def _n_visible(self, n_tokens: int) -> int:
        """Past tokens, of so many, that the next query sees."""
        return min(n_tokens, self.sliding_window - 1)

    def get_max_length(self) -> int:
        return self.sliding_window

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse a `crop` after which the window would lack tokens.

        Raises:
            ShapeError: a positive number.
            RollbackError: tokens that would be in the window again have been dropped.
        """
        super().check_crop(tokens_to_remove)
        store = self._store
        if store is None:
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
        store.forget()
