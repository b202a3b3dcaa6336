"""One layer of a `CompressedDynamicCache`, as transformers' cache protocol wants it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..errors import CacheStateError, DeviceError, PicklingError, ResourceError, ShapeError
from ..preset import Side
from .layer_store import LayerStore, Policy
from .native_store import NativeStore
from .padding import PaddedRows, Padding
from .states import Form, check_alike
from .stores import make_store


class Stub(NamedTuple):
    """What a tensor stands for that `update` returns while attention comes straight to the layer.

    Attributes:
        layer: whose keys they are.
        n_tokens: what it held then, forgotten ones among them.
    """

    layer: CompressedLayer
    n_tokens: int


class CompressedLayer(DynamicLayer):
    """Keeps one layer's keys and values compressed; `update` returns them expanded, for the time of one call.

    The store is made when the first tensors show device, dtype and shape.

    Args:
        k_compressor, v_compressor: see `kvlathe.compressors`.
        policy: which tokens stay exact.
        device: where tensors must live; None takes the first ones' device.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        device: torch.device | None = None,
    ) -> None:
        self._store: LayerStore | None = None
        self._k_compressor, self._v_compressor = k_compressor, v_compressor
        self.policy = policy
        self._wanted_device = device
        self.record_past = False
        # Set by `attach`'s hook just before `update`: attention will come straight to `attend`.
        self.attends_next = False
        # Of the rows that the next sequence begins with: what somebody has noted, what the hook sees in the mask of the
        # pass; and of those that are held.
        self.padding_noted: PaddedRows | None = None
        self.padding_seen: PaddedRows | None = None
        self._padding: Padding | None = None
        super().__init__()

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

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._begin(key_states, value_states)

    def _begin(self, key_states: Tensor, value_states: Tensor) -> LayerStore:
        wanted = self._wanted_device
        given = key_states.device
        if wanted is not None and (given.type != wanted.type or (wanted.index not in (None, given.index))):
            raise DeviceError(
                f"the cache was made for device={str(wanted)!r}, the model's keys are on {str(given)!r}; "
                f"load the preset with device={given.type!r}"
            )
        self.dtype, self.device = key_states.dtype, given
        self._form = Form.of(key_states, value_states)
        # What stubs show: one element seen through zero strides, the right shape without the memory.
        self._element = key_states.new_zeros(())
        store = self._store = self._new_store(key_states, value_states)
        self.is_initialized = True
        return store

    def _new_store(self, key_states: Tensor, value_states: Tensor) -> LayerStore:
        return make_store(self._k_compressor, self._v_compressor, self.policy, key_states, value_states)

    def _read(self, store: LayerStore, room: int = 0) -> tuple[Tensor, Tensor]:
        keys, values = store.read(room)
        if self._padding is not None:
            self._padding.to_tokens(keys)
            self._padding.to_tokens(values)
        return keys, values

    def _take_padding(self, n_new: int, batch: int) -> None:
        """What the first tokens of a sequence mean for the exact slots. A sliding window's are its first ones."""
        told = self.padding_seen or self.padding_noted
        self._padding = None
        if told is not None and not self.is_sliding:
            self._padding = told.in_slots(n_new, batch, self.policy.n_sinks)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, q, D] and return all keys and values [B, H, n_tokens, D].

        The new tokens, and those that were exact before the call, come back bit for bit.

        Raises:
            ShapeError, DtypeError, DeviceError: tensors unlike those the layer holds; the layer is unchanged.
            NonFiniteError: NaN or infinity in what would be coded; the layer is unchanged.
            ResourceError: no memory; the layer is unchanged.
        """
        store = self._store
        if store is None:
            check_alike(key_states, value_states)
        else:
            self._form.check(key_states, value_states, store.batch)
        fresh = store is None
        if store is None:
            store = self._begin(key_states, value_states)
        if self.record_past:
            # What a rollback could still remove was removed before this call; the rest may be coded now.
            store.compress()
        attends, self.attends_next = self.attends_next, False
        # Gradients cannot flow through native attention; the dense way keeps those of the new tokens.
        attends = attends and not (torch.is_grad_enabled() and key_states.requires_grad)
        # The first tokens of a sequence have nothing packed behind them: dense attention takes them as they come.
        if attends and store.can_attend and store.n_tokens:
            return self._update_for_attention(store, key_states, value_states)
        mark, told, padding = store.mark(), (self.padding_seen, self.padding_noted), self._padding
        try:
            if store.n_tokens:
                keys, values = self._read(store, room=key_states.shape[2])
                # From the end: a sliding window shows less than all that came before.
                keys[:, :, keys.shape[2] - key_states.shape[2] :] = key_states
                values[:, :, values.shape[2] - value_states.shape[2] :] = value_states
                store.append(key_states, value_states)
            else:
                keys, values = key_states, value_states
                self._take_padding(key_states.shape[2], key_states.shape[0])
                if self._padding is None:
                    store.append(key_states, value_states)
                else:
                    store.append(self._padding.to_slots(key_states), self._padding.to_slots(value_states))
            if not self.record_past:
                self._settle(store)
            self.padding_seen = self.padding_noted = None
        except Exception as error:
            if fresh:
                self.reset()
            else:
                store.return_to(mark)
            (self.padding_seen, self.padding_noted), self._padding = told, padding
            if "can't allocate memory" in str(error) and isinstance(error, RuntimeError):
                # torch has no class of its own for the CPU's memory.
                raise ResourceError(
                    f"out of memory: torch could not expand {self.get_seq_length()} tokens of one layer; the layer is "
                    f"as it was, so free memory and try again, or attach() the model, which expands nothing"
                ) from error
            raise
        return keys, values

    def _update_for_attention(
        self, store: LayerStore, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and return stubs that stand for all that these see; `attend` must follow."""
        batch, heads, n_new, key_dim = key_states.shape
        value_dim, n_past = value_states.shape[3], store.n_tokens
        n_seen = self._n_visible(n_past) + n_new
        store.append(key_states, value_states)
        keys = values = self._element.expand(batch, heads, n_seen, key_dim)
        keys.kvlathe_stub = Stub(self, n_past + n_new)  # type: ignore[attr-defined]
        if value_dim != key_dim:
            values = self._element.expand(batch, heads, n_seen, value_dim)
        return keys, values

    def _settle(self, store: LayerStore) -> None:
        """Code what is due, now that nobody will roll it back."""
        store.compress()

    def _n_visible(self, n_tokens: int) -> int:
        """Past tokens, of so many, that the next query sees."""
        return n_tokens

    def attend(
        self,
        queries: Tensor,
        *,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_scores: Tensor | None = None,
        n_tokens: int | None = None,
    ) -> Tensor:
        """Attention from the packed blocks, for the stubs of the last `update`: [B, Hq, q, D] to [B, q, Hq, D].

        Args:
            n_tokens: as many as the stubs stand for, if the caller has them.

        Raises:
            CacheStateError: the layer holds another number: another thread has changed it since.
        """
        store = self._store
        if not isinstance(store, NativeStore):
            raise CacheStateError(
                "this layer was reset between its update and its attention: another thread uses the same cache; give "
                "each thread a cache of its own"
            )
        if mask is not None and self._padding is not None:
            mask = self._padding.mask_of_slots(mask)
        out = store.attend(
            queries,
            n_tokens=store.n_tokens if n_tokens is None else n_tokens,
            mask=mask,
            scaling=scaling,
            softcap=softcap,
            sink_scores=sink_scores,
        )
        # Only now: the queries had to see the tail exactly. What a rollback may still remove waits.
        if not self.record_past:
            self._settle(store)
        return out

    def get_seq_length(self) -> int:
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

    def memory_use(self) -> tuple[int, int]:
        """Bytes truly held: (exact, coded)."""
        store = self._store
        return store.memory_use() if store else (0, 0)

    def values_held(self) -> tuple[int, int]:
        """How many numbers keys and values amount to, and the bytes the stock cache would take for them."""
        store = self._store
        if store is None:
            return 0, 0
        n = self._form.values_per_token * self._n_visible(store.n_tokens) * store.batch
        return n, n * self.dtype.itemsize

    def activate_past_recording(self) -> None:
        """Code tokens only once the next call shows that they were not rolled back (assisted decoding)."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` could not do.

        Raises:
            ShapeError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ShapeError(
                f"crop({tokens_to_remove}): give a negative number of tokens to remove; to keep {tokens_to_remove} "
                f"tokens, call crop({tokens_to_remove} - cache.get_seq_length())"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; zero or negative, as in transformers 5.

        Exact tokens vanish without a trace. A cut into coded tokens leaves the rest of their block as decoded.
        """
        self.check_crop(tokens_to_remove)
        store = self._store
        if store is None or tokens_to_remove >= 0:
            return
        n_left = max(0, store.n_tokens + tokens_to_remove)
        if self._padding is not None and n_left < self._padding.reach:
            # Less than the padding and the first tokens: what is left begins anew, in the order of tokens.
            keys, values = (states[:, :, :n_left] for states in self._read(store))
            self._padding = None
            store.crop(store.n_tokens)
            store.append(keys, values)
        else:
            store.crop(store.n_tokens - n_left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        store = self._store
        if store is not None and store.n_tokens:
            batch = store.batch
            try:
                picked = torch.arange(batch)[indices.cpu()]
            except IndexError as error:
                raise ShapeError(
                    f"batch index {indices.tolist()} does not exist, the cache holds {batch} rows"
                ) from error
            self._select(store, picked.reshape(-1).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        store = self._store
        if store is not None and store.n_tokens:
            self._select(store, [row for row in range(store.batch) for _ in range(repeats)])

    def _select(self, store: LayerStore, rows: list[int]) -> None:
        if not rows:
            raise ShapeError("no rows to keep; reset() empties a cache")
        store.select(rows)
        if self._padding is not None:
            self._padding = self._padding.select(rows)

    def reset(self) -> None:
        self._store = None
        self.is_initialized = False
        self.record_past = False
        self.attends_next = False
        self.padding_noted = self.padding_seen = self._padding = None

    def offload(self) -> None:
        """Nothing to do: what is held is already small, and expanded tensors are never kept."""

    def prefetch(self) -> None:
        """Nothing to do; see `offload`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PicklingError(
            "a compressed cache cannot be pickled, as its blocks lie in native memory; copy it within a process with "
            "copy.deepcopy(cache), and in another process load the preset and run the tokens through the model there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayer:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name == "_store":
                twin._store = value.copy() if value is not None else None
            elif name in ("_k_compressor", "_v_compressor"):
                twin.__dict__[name] = value
            else:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin
