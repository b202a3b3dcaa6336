"""What one layer of a cache holds: looked at, measured, exported, copied and pickled, but not changed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..errors import CacheStateError, ShapeError
from ..preset import Side
from ..stores import LayerParts, Policy, Store
from .handout import Handout, as_the_model_knows
from .padding import PaddedRows, Padding
from .states import Form

Contents = TypeVar("Contents", bound="LayerContents")


class LayerContents(DynamicLayer):
    """What a `CompressedLayer` holds; its methods change nothing.

    Args:
        As of `CompressedLayer`.
    """

    #: Of keys and values, once there are some.
    form: Form
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        device: torch.device | None = None,
    ) -> None:
        self._k_compressor, self._v_compressor = k_compressor, v_compressor
        self.policy = policy
        # Names of transformers.
        self.is_sliding = policy.window is not None
        if policy.window is not None:
            self.sliding_window = policy.window
        self._wanted_device = device
        self._empty()
        super().__init__()

    def _empty(self) -> None:
        """As before the first tokens."""
        self._store: Store | None = None
        self.is_initialized = False
        self.record_past = False
        # What the store holds, as a number that the code of a compiled model can read.
        self._n_tokens_for_compilers = 0
        # Of the rows that the next sequence begins with, if somebody has noted it; and of those that are held.
        self.padding_noted: PaddedRows | None = None
        self.padding: Padding | None = None
        # The latest handout, while somebody holds it; whether what is due waits for its attention.
        self._handout: ref[Handout] | None = None
        self._waits = False
        # Whether held tokens were computed with gradients: their graph is not kept.
        self._lost_graph = False

    # Every method looks at `_store` once: a `reset` from another thread may take it away in between.

    # The protocol's `keys` and `values`: expanded on demand, never kept.
    @property
    def keys(self) -> Tensor | None:
        store = self._store
        return self._read(store)[0] if store else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:
        store = self._store
        return self._read(store)[1] if store else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    def _refuse_assignment(self, value: Tensor | None) -> None:
        if value is not None:
            raise ShapeError(
                "keys and values of a compressed layer cannot be assigned: use update(), crop(), reorder_cache()"
            )

    @property
    def store(self) -> Store:
        """What holds the tokens.

        Raises:
            CacheStateError: nothing does, as another thread has reset the cache.
        """
        if self._store is None:
            raise CacheStateError(
                "this layer was reset between its update and its attention: another thread uses the same cache; give "
                "each thread a cache of its own"
            )
        return self._store

    def _read(self, store: Store, room: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens that the next query sees, and room for more."""
        n_tokens = store.n_tokens
        states = store.read(self.policy.first_seen(n_tokens), n_tokens, n_tokens=n_tokens, room=room)
        return as_the_model_knows(states, self.padding, self.form)

    def _n_visible(self, n_tokens: int) -> int:
        """Past tokens, of so many, that the next query sees."""
        return n_tokens - self.policy.first_seen(n_tokens)

    def get_max_length(self) -> int | None:  # type: ignore[override]
        return super().get_max_length() if self.policy.window is None else self.policy.window

    def get_seq_length(self) -> int:
        if torch.compiler.is_compiling():
            return self._n_tokens_for_compilers
        store = self._store
        return store.n_tokens if store else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        n_tokens = self.get_seq_length()
        visible = self._n_visible(n_tokens)
        return visible + query_length, n_tokens - visible

    def compressor(self, side: Side) -> nn.Module:
        """The compressor of the "key" or "value" side."""
        return self._k_compressor if side == "key" else self._v_compressor

    @property
    def held(self) -> tuple[int, int]:
        """Tokens, and sequences that have them."""
        store = self._store
        n_tokens = store.n_tokens if store else 0
        return n_tokens, store.batch if store and n_tokens else 0

    @property
    def n_coded(self) -> int:
        """Tokens held in coded form."""
        store = self._store
        return store.n_coded if store else 0

    def memory_use(self) -> tuple[int, int, int]:
        """Bytes truly held: exact, coded, and those of the coded ones that lie in somebody else's memory."""
        store = self._store
        return store.memory_use() if store else (0, 0, 0)

    def values_held(self) -> tuple[int, int]:
        """How many numbers keys and values amount to, and the bytes the stock cache would take for them."""
        store = self._store
        if store is None:
            return 0, 0
        n = self.form.values_per_token * self._n_visible(store.n_tokens) * store.batch
        return n, n * self.dtype.itemsize

    def export_parts(self) -> LayerParts:
        """What the layer holds, as values: packed blocks that share their bytes with it, exact tokens copied.

        Raises:
            CacheStateError: it holds nothing.
            BlockError: it is coded by a compressor that packs no blocks, or whose blocks have no name.
        """
        store = self._store
        if store is None or not store.n_tokens:
            raise CacheStateError(
                "this layer holds no tokens, so there is nothing to export; export it once it has been updated"
            )
        return LayerParts(store.export_parts("key"), store.export_parts("value"), self.padding)

    def __copy__(self: Contents) -> Contents:
        # Two layers cannot share a store: a copy shares what never changes, the packed blocks.
        return self.__deepcopy__({})

    def __deepcopy__(self: Contents, memo: dict[int, Any]) -> Contents:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name == "_store":
                twin._store = value.copy() if value is not None else None
            elif name in ("_k_compressor", "_v_compressor"):
                twin.__dict__[name] = value
            elif name == "_handout":
                twin._handout = None  # what was handed out is of this layer
            else:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin
