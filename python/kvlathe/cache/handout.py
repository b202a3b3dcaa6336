"""What one `update` of a layer hands out: its tokens as they were then, until the last lazy tensor of them is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor

from ..errors import CacheStateError, ResourceError
from ..lazy import LazyStates, lazy_pair, unwatched
from ..stores import Store
from ..stores.out_of_memory import raise_if_out_of_memory
from .expansions import Expansions
from .padding import PaddedRows, Padding, mask_of_slots
from .states import Form

if TYPE_CHECKING:
    from .layer import CompressedLayer


def as_the_model_knows(
    states: tuple[Tensor, Tensor], padding: Padding | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Keys and values that a store has given: tokens in order, in the model's number formats."""
    keys, values = states
    if padding is not None:
        padding.to_tokens(keys)
        padding.to_tokens(values)
    return form.shown(keys, values)


class Handout:
    """A layer's tokens after an update, for attention from the blocks or to be expanded; see `kvlathe.lazy.Handout`.

    A layer codes what is due as soon as attention has been through. Whoever looks again later finds what was there
    before: just before a layer changes, `keep` takes a copy, which shares the packed blocks.

    Args:
        layer: whose tokens they are.
        store: holds them.
        n_new: tokens that the update brought, the last ones.
        dense: the new keys and values, where there are no others.
        expansions: is told if these tokens are expanded, as those of layer ``layer_idx``.
    """

    __slots__ = (
        "__weakref__", "_expansions", "_form", "_is_first", "_layer", "_layer_idx", "_store", "_views", "batch",
        "dense", "dtype", "memo", "n_kv_heads", "n_new", "n_tokens", "padding", "window",
    )  # fmt: skip

    def __init__(
        self,
        layer: CompressedLayer,
        store: Store,
        n_new: int,
        dense: tuple[Tensor, Tensor] | None,
        expansions: Expansions,
        layer_idx: int,
    ) -> None:
        self._layer, self._expansions, self._layer_idx = layer, expansions, layer_idx
        self._store: Store | None = store
        self._is_first = dense is not None
        self._views: list[ref[LazyStates]] = []
        self.dense, self.memo = dense, expansions.memo
        self.n_new, self.n_tokens, self.batch = n_new, store.n_tokens, store.batch
        self.padding, self.window = layer.padding, layer.policy.window
        self._form = layer.form
        self.n_kv_heads, self.dtype = layer.form.dims[0][0], layer.form.dtype

    def states(self) -> tuple[LazyStates, LazyStates]:
        """Lazy keys and values, of all tokens that the new ones' queries see."""
        form = self._form
        (_, key_dim), (_, value_dim) = form.dims
        n_shown = self.n_shown_to(self.n_new)
        return lazy_pair(self, n_shown, (key_dim, value_dim), form.dtypes, form.device)

    def attend(
        self,
        queries: Tensor,
        *,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_scores: Tensor | None = None,
    ) -> Tensor:
        """Attention over the tokens, from packed blocks where the store can; see `Store.attend`.

        Raises:
            CacheStateError: the cache has gone on, and what was here could not be kept.
            ResourceError: no memory.
        """
        if mask is not None and self.padding is not None:
            mask = self.memo.find(mask_of_slots, mask, self.padding)
        store = self._held()
        out, _ = store.attend(
            queries,
            n_tokens=self.n_tokens,
            mask=mask,
            scaling=scaling,
            softcap=softcap,
            sink_scores=sink_scores,
        )
        if not store.attends_packed:
            self._expansions.add(self._layer_idx, store.why_expanded)
        # Only now: the queries had to see the newest tokens exactly.
        self._layer.attended(self)
        return out

    def see(self, mask: Tensor | None) -> None:
        """The mask of a sequence's first pass: it shows which rows begin with padding. Then the tokens may be coded."""
        if self._is_first:
            find = PaddedRows.of_first_pass
            rows = None if mask is None else self.memo.find(find, mask, self.batch, self.n_new)
            self._layer.begun(self, rows)
            self._is_first = False

    def expand(self, reason: str) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as ordinary tensors; ``reason`` is a sentence for the user.

        Raises:
            CacheStateError, ResourceError: as for `attend`.
        """
        dense = self.dense
        if dense is None:
            try:
                with unwatched():
                    first = self.n_tokens - self.n_shown_to(self.n_new)
                    states = self._held().read(first, self.n_tokens, n_tokens=self.n_tokens)
                    dense = self.dense = as_the_model_knows(states, self.padding, self._form)
            except RuntimeError as error:
                raise_if_out_of_memory(error, self.n_tokens)
                raise
            # Copies that were made of them do not change with them.
            for view in [view() for view in self._views]:
                if view is not None:
                    view.expanded(reason)
            self._expansions.add(self._layer_idx, reason)
            self._layer.attended(self)
        elif self._is_first:
            # Their attention may still come, and show where padding is.
            self._expansions.settle_later(self._layer)
        return dense

    def n_shown_to(self, n_queries: int) -> int:
        """Tokens that any of so many queries sees, the last one at the last token."""
        if self.window is None:
            return self.n_tokens
        return min(self.n_tokens, self.window - 1 + n_queries)

    def note_view(self, view: LazyStates) -> None:
        """A view of the keys or values, which must not change when somebody writes to them later."""
        if self.dense is None:
            self._views.append(ref(view))

    def _held(self) -> Store:
        store = self._store
        if store is None:
            raise CacheStateError(
                f"keys or values that layer {self._layer_idx} handed out when it held {self.n_tokens} tokens are used "
                f"after the cache has gone on, and there was no memory to keep them; clone() them in time"
            )
        return store

    def keep(self) -> None:
        """The layer is about to change."""
        if self._store is not None:
            try:
                self._store = self._store.copy() if self.dense is None else None
            except ResourceError:
                # Most likely nobody looks again; whoever does is told.
                self._store = None
