"""One layer of a `CompressedDynamicCache`, as transformers' cache protocol wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import BlockError, CacheStateError, DeviceError, RollbackError, ShapeError
from ..saved import by_maker
from ..stores import LayerParts, Store, make_store
from ..stores.out_of_memory import raise_if_out_of_memory
from .expansions import Expansions
from .handout import Handout
from .layer_contents import LayerContents
from .lost_graph import with_lost_graph
from .padding import PaddedRows, Padding
from .states import Form, check_alike


class CompressedLayer(LayerContents):
    """Keeps one layer's keys and values compressed.

    `update` returns them expanded, for the time of one call; `hand_out` lazily, for attention from the blocks. The
    store is made when the first tensors show device, dtype and shape.

    Args:
        k_compressor, v_compressor: see `kvlathe.compressors`.
        policy: which tokens stay exact. With a window the layer holds that and nothing older, coded like any other;
            sinks stay exact as long as they are in the window.
        device: where tensors must live; None takes the first ones' device.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._begin(key_states, value_states)

    def _begin(self, key_states: Tensor, value_states: Tensor) -> Store:
        wanted = self._wanted_device
        given = key_states.device
        if wanted is not None and (given.type != wanted.type or (wanted.index not in (None, given.index))):
            raise DeviceError(
                f"the cache was made for device={str(wanted)!r}, the model's keys are on {str(given)!r}; "
                f"load the preset with device={given.type!r}"
            )
        self.form = Form.of(key_states, value_states)
        self.dtype, self.device = self.form.dtype, given
        store = self._store = self._new_store(key_states, value_states)
        self.is_initialized = True
        return store

    def _new_store(self, key_states: Tensor, value_states: Tensor) -> Store:
        keys, values = self.form.held(key_states), self.form.held(value_states)
        return make_store(self._k_compressor, self._v_compressor, self.policy, keys, values)

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
        return self._add(key_states, value_states, self._show_expanded)

    def hand_out(
        self, key_states: Tensor, value_states: Tensor, expansions: Expansions, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """As `update`, but lazily where attention can be served from the blocks, or where the first tokens may have
        padding in front, which their attention's mask shows. What is due is coded when attention has been through, or
        by `settle`.

        Args:
            expansions: is told where held tokens have to be expanded, as those of layer ``layer_idx``.
        """
        graph = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad or self._lost_graph
        )
        graph = graph or forward_ad._current_level >= 0
        store = self._store
        if store is None or not store.n_tokens:
            # Windows, and stores without sinks, have no use for padding.
            if graph or self.is_sliding or self.policy.n_sinks == 0 or self.padding_noted is not None:
                return self.update(key_states, value_states)

            def begin(store: Store, _: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                self.padding = None
                self._append(store, keys, values)
                return self._lazily(
                    Handout(self, store, keys.shape[2], (keys, values), expansions, layer_idx)
                )

            return self._add(key_states, value_states, begin)
        if graph or store.is_exact:
            reason = "gradients are to flow through it; use torch.no_grad() where you need none"
            expansions.add(layer_idx, None if store.is_exact else reason)
            return self.update(key_states, value_states)
        form = self.form.taking(key_states, value_states, store.batch)
        self._settle_what_waits(store)
        self._keep_handout()
        # A store takes tokens or refuses them; nothing else has been changed so far.
        store.append(form.held(key_states), form.held(value_states))
        self.form = form
        return self._lazily(Handout(self, store, key_states.shape[2], None, expansions, layer_idx))

    def _lazily(self, handout: Handout) -> tuple[Tensor, Tensor]:
        """Tokens that have just been appended, and all that their queries see before them."""
        self._waits = True
        self._n_tokens_for_compilers = handout.n_tokens
        self._handout = ref(handout)
        return handout.states()

    def _add(
        self,
        key_states: Tensor,
        value_states: Tensor,
        show: Callable[[Store, int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Check new tokens and give them to ``show``, with the store and what it holds; all or nothing happens."""
        store = self._store
        fresh = store is None
        if store is None:
            check_alike(key_states, value_states)
            store, form = self._begin(key_states, value_states), self.form
        else:
            form = self.form.taking(key_states, value_states, store.batch)
        self._settle_what_waits(store)
        held = (self.form, self.padding_noted, self.padding, self._lost_graph, self.record_past)
        mark = store.mark()
        try:
            self.form = form
            self._keep_handout()
            states = show(store, store.n_tokens, key_states, value_states)
            self._n_tokens_for_compilers = store.n_tokens
            return states
        except Exception as error:
            if fresh:
                self.reset()
            else:
                store.return_to(mark)
            self.form, self.padding_noted, self.padding, self._lost_graph, self.record_past = held
            self._waits = False
            raise_if_out_of_memory(error, self.get_seq_length())
            raise

    def _show_expanded(
        self, store: Store, n_past: int, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_new = key_states.shape[2]
        if n_past:
            keys, values = self._read(store, room=n_new)
            if self._lost_graph and torch.is_grad_enabled():
                keys, values = with_lost_graph(keys, n_past), with_lost_graph(values, n_past)
            # From the end: a sliding window shows less than all that came before.
            keys[:, :, keys.shape[2] - n_new :] = key_states
            values[:, :, values.shape[2] - n_new :] = value_states
            self._append(store, key_states, value_states)
        else:
            keys, values = key_states, value_states
            self._take_padding(self.padding_noted, n_new, key_states.shape[0])
            self._append_first(store, key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._lost_graph = True
        if not self.record_past:
            self._settle(store)
        self.padding_noted = None
        return keys, values

    def _append(self, store: Store, key_states: Tensor, value_states: Tensor) -> None:
        store.append(self.form.held(key_states), self.form.held(value_states))

    def _append_first(self, store: Store, key_states: Tensor, value_states: Tensor) -> None:
        if self.padding is not None:
            key_states, value_states = self.padding.to_slots(key_states), self.padding.to_slots(value_states)
        self._append(store, key_states, value_states)

    def _take_padding(self, told: PaddedRows | None, n_new: int, batch: int) -> None:
        """What the first tokens of a sequence mean for the exact slots. A sliding window's are its first ones."""
        self.padding = None
        if told is not None and not self.is_sliding:
            self.padding = told.in_slots(n_new, batch, self.policy.n_sinks)

    def attended(self, handout: Handout) -> None:
        """Attention has been through what was handed out: what is due may be coded, unless it may be rolled back."""
        if self._is_latest(handout):
            self.settle()

    def begun(self, handout: Handout, rows: PaddedRows | None) -> None:
        """As `attended`, of a sequence's first tokens, whose mask has shown which rows begin with padding."""
        if not (self._waits and self._is_latest(handout)):
            return
        held = self.store
        self._take_padding(rows, held.n_tokens, held.batch)
        if self.padding is not None:
            try:
                # From what is held, all of it exact: the model's own tensors may have been written to since.
                keys, values = held.read(0, held.n_tokens, n_tokens=held.n_tokens)
                store = self._new_store(keys, values)
                self._append_first(store, keys, values)
            except Exception:
                self.padding = None
                raise
            self._store = store
        self.settle()

    def _is_latest(self, handout: Handout) -> bool:
        return self._handout is not None and self._handout() is handout

    def _keep_handout(self) -> None:
        """Before the layer changes: who still holds what it handed out is to find it unchanged."""
        handout = self._handout() if self._handout is not None else None
        if handout is not None:
            handout.keep()

    def _settle_what_waits(self, store: Store) -> None:
        """Before new tokens come."""
        if self.record_past:
            # What a rollback could still remove was removed before this call; the rest may be coded now.
            self._keep_handout()
            store.compress()
        elif self._waits:
            # No attention has come.
            self._settle(store)

    def settle(self) -> None:
        """Code what waits for attention, unless it may be rolled back. Whoever holds what was handed out keeps it."""
        if self._waits and not self.record_past:
            self._settle(self.store)

    def settle_or_take_back(self, n_new: int) -> None:
        """`settle` behind an update by hand, whose tokens go again if that fails."""
        try:
            self.settle()
        except Exception:
            self._waits = False
            self.crop(-n_new)
            raise

    def _settle(self, store: Store) -> None:
        """Code what is due, now that nobody will roll it back."""
        if store.would_settle():
            self._keep_handout()
            store.settle()
        self._waits = False

    def activate_past_recording(self) -> None:
        """Code tokens only once the next call shows that they were not rolled back (assisted decoding)."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` could not do.

        Raises:
            ShapeError: a positive number.
            RollbackError: tokens that would be in the window again have been dropped.
        """
        if tokens_to_remove > 0:
            raise ShapeError(
                f"crop({tokens_to_remove}): give a negative number of tokens to remove; to keep {tokens_to_remove} "
                f"tokens, call crop({tokens_to_remove} - cache.get_seq_length())"
            )
        store = self._store
        n_left = store.n_tokens + tokens_to_remove if store else 0
        if store and n_left > 0 and self.policy.first_seen(n_left) < store.first:
            raise RollbackError(
                f"crop({tokens_to_remove}) would leave {n_left} tokens, but this layer's window of "
                f"{self.policy.window} has dropped the first {store.first} tokens already; call "
                f"activate_past_recording() before the tokens that may be removed, or reset() and start again"
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
        if n_left == 0 and self.policy.window is not None:
            # Nothing is left, so what was dropped is not missed either.
            recorded = self.record_past
            self.reset()
            self.record_past = recorded
            return
        self._keep_handout()
        if self.padding is not None and n_left < self.padding.reach:
            # Less than the padding and the first tokens: what is left begins anew, in the order of tokens.
            keys, values = (states[:, :, :n_left] for states in self._read(store))
            self.padding = None
            store.crop(store.n_tokens)
            self._append(store, keys, values)
        else:
            store.crop(store.n_tokens - n_left)
            if self.is_sliding:
                store.forget()
        self._n_tokens_for_compilers = n_left

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
                    f"rows {indices.tolist()} are asked for, and the cache holds {batch}, counted from 0; give rows "
                    f"that it has"
                ) from error
            self._select(store, picked.reshape(-1).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        store = self._store
        if store is not None and store.n_tokens:
            self._select(store, [row for row in range(store.batch) for _ in range(repeats)])

    def _select(self, store: Store, rows: list[int]) -> None:
        if not rows:
            raise ShapeError("no rows to keep; reset() empties a cache")
        self._keep_handout()
        store.select(rows)
        if self.padding is not None:
            self.padding = self.padding.select(rows)

    def reset(self) -> None:
        self._empty()

    def offload(self) -> None:
        """Nothing to do: what is held is already small, and expanded tensors are never kept."""

    def prefetch(self) -> None:
        """Nothing to do; see `offload`."""

    def import_parts(self, parts: LayerParts) -> None:
        """Fill the layer, which must be empty, with what another one has exported. On the CPU blocks are attended to
        where they lie. The layer then goes on as the other one would have.

        Raises:
            CacheStateError: it holds tokens.
            BlockError: blocks of another preset, layer or side, out of order, with gaps, or of another length;
                something that is no `LayerParts`.
            ShapeError, DtypeError, DeviceError: parts that do not fit each other or this layer.
            NonFiniteError: NaN or infinity in exact tokens of a coded side.
        """
        if self.get_seq_length():
            raise CacheStateError(
                f"this layer holds {self.get_seq_length()} tokens, but blocks are imported into an empty one; call "
                f"reset() first"
            )
        if not isinstance(parts, LayerParts):
            raise BlockError(
                f"a {type(parts).__name__} is no kvlathe.LayerParts, which export_parts() of a layer gives"
            )
        parts.check()
        keys, values, padding = parts.key, parts.value, parts.padding
        check_alike(keys.tail[:, :, :0], values.tail[:, :, :0])
        recorded, noted = self.record_past, self.padding_noted
        try:
            store = self._begin(keys.tail, values.tail)
            store.import_parts(keys, values)
            if padding is not None:
                if not isinstance(padding, Padding) or self.is_sliding:
                    raise ShapeError(
                        f"padding is a {type(padding).__name__}, expected what a layer without a window has exported"
                    )
                padding.check(*self.held, self.policy.n_sinks)
        except Exception:
            self._empty()
            self.record_past, self.padding_noted = recorded, noted
            raise
        self.padding, self.padding_noted = padding, None
        # What is due is coded with the next tokens.
        self._waits = True
        self._n_tokens_for_compilers = store.n_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        store, contents = self._store, None
        if store is not None:
            parts = LayerParts(store.saved_parts("key"), store.saved_parts("value"), self.padding)
            contents = parts, self.form.dtypes
        kind = None if type(self) is CompressedLayer else type(self)
        return by_maker(
            "layer", kind, self._k_compressor, self._v_compressor, astuple(self.policy), self._wanted_device,
            contents, (self.record_past, self._waits, self._lost_graph, self.padding_noted),
        )  # fmt: skip
