"""`LazyStates`: keys or values that an update hands out before anybody has said what for.

Attention through `torch.nn.functional.scaled_dot_product_attention` is answered from the packed blocks. Views on the
way there that only rearrange heads stay lazy. Whatever else touches them meets an ordinary tensor: the held tokens,
expanded, once for all that ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .attention import Refusal, attend
from .heads import VIEWS, Heads, in_order
from .masks import PassMemo

Side = Literal["key", "value"]
# torch's own, whoever puts something of theirs in its place later.
_SDPA = torch._C._nn.scaled_dot_product_attention


class Handout(Protocol):
    """What a pair of lazy keys and values stands for: one layer's tokens as they were after one update."""

    @property
    def batch(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def window(self) -> int | None:
        """Tokens that a query sees, its own included; None for all."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is held, which queries must have."""

    @property
    def memo(self) -> PassMemo:
        """Of the pass that the update belongs to."""

    def n_shown_to(self, n_queries: int) -> int:
        """Tokens that any of so many queries sees, the last one at the last token."""

    def note_view(self, view: LazyStates) -> None:
        """A view of the keys or values, which must not change when somebody writes to them later."""

    @property
    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values as ordinary tensors if they are at hand; somebody may have written to them since."""

    def attend(
        self,
        queries: Tensor,
        *,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_scores: Tensor | None = None,
    ) -> Tensor:
        """Queries [B, Hq, q, D] to [B, q, Hq, Dv]; see `kvlathe.cache.handout`."""

    def see(self, mask: Tensor | None) -> None:
        """A mask [1 or B, 1, q, T] that attention of the first tokens goes by, before it does."""

    def expand(self, reason: str) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D]; ``reason`` is a sentence for the user, without its full stop."""


def _readers() -> frozenset[Callable[..., Any]]:
    """What tells of sizes and kind only, and what Python does with any object."""
    names = "dim ndimension size numel nelement element_size is_floating_point is_complex __len__ __hash__".split()
    getters = "shape dtype device ndim layout is_cpu is_cuda is_meta is_mps is_xpu is_sparse".split()
    getters += "requires_grad is_leaf grad_fn grad".split()
    attributes = [getattr(Tensor, name).__get__ for name in getters if hasattr(Tensor, name)]
    functions = [torch.is_floating_point, torch.is_complex, torch.numel]
    return frozenset([*(getattr(Tensor, name) for name in names), *attributes, *functions])


_READERS = _readers()
# They give back the tensor itself where it is what they ask for already. Some models place what layers share.
_CASTS = frozenset(
    getattr(Tensor, name) for name in "to type type_as float half bfloat16 double cpu cuda".split()
)


def _changes(cast: Callable[..., Any], states: LazyStates, given: Any, named: dict[str, Any]) -> bool:
    """Whether torch would make another tensor, asked with one that holds no numbers."""
    stand_in = torch.empty((0,) * len(states.shape), dtype=states.dtype, device=states.device)
    with torch._C.DisableTorchFunctionSubclass():
        return cast(stand_in, *given, **named) is not stand_in


class LazyStates(Tensor):
    """Keys or values [B, *heads, T, D] of a `Handout`.

    Attributes:
        handout: what they stand for.
        side: which of the two.
        heads: how heads are arranged.
    """

    handout: Handout
    side: Side
    heads: Heads
    # In place of torch's getters, which would come by `__torch_function__`: every layer of every step asks for them.
    shape: torch.Size = None  # type: ignore[assignment]
    dtype: torch.dtype = None  # type: ignore[assignment]
    device: torch.device = None  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[LazyStates],
        handout: Handout,
        side: Side,
        heads: Heads,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyStates:
        states: LazyStates = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        # There is no memory behind them: whoever goes past torch's functions to it is told.
        torch._C._set_throw_on_mutable_data_ptr(states)
        states.handout, states.side, states.heads = handout, side, heads
        states.shape, states.dtype, states.device = shape, dtype, device
        return states

    # For a view: what it is of, and the call that made it.
    _made_by: tuple[LazyStates, Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] | None = None
    _dense: Tensor | None = None

    def expanded(self, reason: str) -> Tensor:
        """As an ordinary tensor, the same for every call.

        Args:
            reason: a sentence for the user, without its full stop.

        Raises:
            CacheStateError: the cache has gone on, and what they stood for could not be kept.
            ResourceError: no memory.
        """
        if self._dense is None:
            if self._made_by is None:
                self._dense = self.handout.expand(reason)[self.side == "value"]
            else:
                parent, function, arguments, named = self._made_by
                self._dense = function(parent.expanded(reason), *arguments, **named)
        return self._dense

    def _view(
        self, function: Callable[..., Tensor], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> LazyStates | None:
        heads = VIEWS[function].arranged(self.heads, self.shape, arguments, named)
        if heads is None:
            return None
        shape = torch.Size((self.shape[0], *heads.shape, *self.shape[-2:]))
        view = LazyStates(self.handout, self.side, heads, shape, self.dtype, self.device)
        view._made_by = self, function, arguments, named
        self.handout.note_view(view)
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return _scaled_dot_product_attention(*args, **kwargs)
        if func in _READERS:
            written = args[0]._dense if isinstance(args[0], LazyStates) else None
            if written is not None:
                return func(written, *args[1:], **kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        states = args[0] if args else None
        if func in VIEWS and isinstance(states, LazyStates):
            view = states._view(func, args[1:], kwargs)
            if view is not None:
                return view
        if func in _CASTS and isinstance(states, LazyStates) and not _changes(func, states, args[1:], kwargs):
            return states
        return func(*_expanded(args, func), **_expanded(kwargs, func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Of calls that came from C++, past `__torch_function__`.
        return func(*_expanded(args, func), **_expanded(kwargs or {}, func))


def _name(function: Any) -> str:
    """What a user would write."""
    name = getattr(function, "__name__", None) or str(function)
    if name == "__get__":
        return f"Tensor.{function.__self__.__name__}"
    if "." in name or ":" in name:
        return name  # of an operator
    return f"Tensor.{name}" if getattr(Tensor, name, None) is function else f"torch.{name}"


def _expanded(arguments: Any, function: Any) -> Any:
    """The same arguments with ordinary tensors."""

    def expand(each: Any) -> Any:
        if not isinstance(each, LazyStates):
            return each
        return each.expanded(
            f"{_name(function)} asked for keys or values, and only torch's scaled_dot_product_attention can be "
            f"answered from packed tokens; load the model with attn_implementation='sdpa', or if it does not have "
            f"that, try kvlathe.attach(model)"
        )

    return tree_map(expand, arguments)


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    refused = "keys or values that were changed"
    if isinstance(key, LazyStates) and isinstance(value, LazyStates):
        if key.handout.dense is None:
            found = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if not isinstance(found, Refusal):
                return found
            refused = found.reason
        elif key.handout is value.handout:
            key.handout.see(attn_mask)
    reason = f"scaled_dot_product_attention was given {refused}, which packed tokens do not serve"
    if isinstance(attn_mask, LazyStates):
        attn_mask = attn_mask.expanded(reason)
    query, key, value = (
        each.expanded(reason) if isinstance(each, LazyStates) else each for each in (query, key, value)
    )
    return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def lazy_pair(
    handout: Handout,
    n_tokens: int,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> tuple[LazyStates, LazyStates]:
    """Keys and values of a handout, [B, H, n_tokens, D], D of both in ``dims``."""
    n_heads, (key_dim, value_dim) = handout.n_kv_heads, dims
    heads = in_order(n_heads)
    key_shape = value_shape = torch.Size((handout.batch, n_heads, n_tokens, key_dim))
    if value_dim != key_dim:
        value_shape = torch.Size((handout.batch, n_heads, n_tokens, value_dim))
    keys = LazyStates(handout, "key", heads, key_shape, dtypes[0], device)
    return keys, LazyStates(handout, "value", heads, value_shape, dtypes[1], device)
