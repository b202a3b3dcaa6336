"""Two-sided attention in place of torch's `scaled_dot_product_attention`, which every model on SDPA calls in the end.

Which layer a call belongs to is known from the cache: a layer hands its keys and values to `update`, and attention is
given these, or the same with heads repeated. A layer that reads what an earlier one handed over (shared keys and
values) is known by that, too: what its far pairs say counts for the layer whose keys they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ...errors import CalibrationError, ModelError
from ...given_model import cache_argument
from ...lazy.heads import Heads, query_order, serving
from ..observing_cache import ObservingCache
from .two_sided_kernel import TwoSidedPlan, two_sided_attention

_SDPA = torch._C._nn.scaled_dot_product_attention


def attention_name(model: PreTrainedModel) -> str:
    """The attention function that the decoder was loaded with, by transformers' name."""
    return str(getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None))


@dataclass
class _Handed:
    """What a layer has handed to the cache.

    Attributes:
        keys, values: while somebody holds them; after the layer's own attention that is a layer that shares them.
        is_read: whether attention has been given them.
        far: gradients of keys and values through far pairs of the layers that share them.
    """

    layer: int
    keys: ref[Tensor]
    values: ref[Tensor]
    is_read: bool = False
    far: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Answers the attention of one model, as its plan says."""

    def __init__(self, model: PreTrainedModel, plan: TwoSidedPlan) -> None:
        super().__init__()
        self._model, self._plan = model, plan
        self._handed: list[_Handed] = []
        # Keys and values whose attention has not come yet, and whether attention to something else has come instead.
        self._awaited: tuple[Tensor, Tensor] | None = None
        self._was_given_others = False

    def inputs(self) -> dict[str, Any]:
        """A new pass begins."""
        self.check_all_read()
        self._handed = []
        return {
            **cache_argument(self._model, ObservingCache(self._model.config, self._note)),
            "use_cache": True,
        }

    def _note(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.check_all_read()
        self._handed.append(_Handed(layer, ref(keys), ref(values)))
        self._awaited, self._was_given_others = (keys, values), False

    def check_all_read(self) -> None:
        """Refuse a model whose attention was not given what a layer handed to the cache.

        Raises:
            ModelError: with the attention function that it uses.
        """
        if self._awaited is None:
            return
        self._awaited = None
        name, layer = type(self._model).__name__, self._handed[-1].layer
        if self._was_given_others:
            raise ModelError(
                f"{name}: attention of layer {layer} is given other keys and values than those that the layer hands to "
                f"its cache, so what coding them costs cannot be measured"
            )
        function = attention_name(self._model)
        raise ModelError(
            f"{name} computes the attention of layer {layer} by its function {function!r} and not by torch's "
            f"scaled_dot_product_attention, which is what calibration and evaluation replace; load it with "
            f"attn_implementation='sdpa', if it has that"
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._attention(*args, **kwargs) if func is _SDPA else None
        return func(*args, **kwargs) if out is None else out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Attention as the plan says; None where it is not that of a layer with a cache."""
        found = self._find(key, value)
        if found is None:
            self._was_given_others = True
            return None
        handed, keys, values, heads = found
        kv_heads = serving(heads, query.shape[1], enable_gqa)
        order = None if kv_heads is None else query_order(kv_heads, keys.shape[1])
        if order is None:
            raise ModelError(
                f"{type(self._model).__name__}: {query.shape[1]} query heads of layer {handed.layer} do not share "
                f"{keys.shape[1]} KV heads evenly, which is not supported"
            )
        if dropout_p:
            raise CalibrationError("attention dropout is on: call model.eval() first")
        plan = self._owners(handed) if not handed.is_read else self._sharers(handed)
        if not handed.is_read:
            handed.is_read, self._awaited = True, None
        mask = _mask(attn_mask, is_causal, query.shape[2], keys.shape[2], query.device)
        if order:
            query = query[:, list(order)]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, list(order)]
        out = two_sided_attention(
            query, keys, values, plan, layer_idx=handed.layer, scaling=scale, attention_mask=mask
        )
        return out[:, sorted(range(len(order)), key=order.__getitem__)] if order else out

    def _find(self, key: Tensor, value: Tensor) -> tuple[_Handed, Tensor, Tensor, Heads] | None:
        """Whose keys and values these are, and how heads are arranged; the latest layer comes first."""
        for handed in reversed(self._handed):
            keys, values = handed.keys(), handed.values()
            if keys is None or values is None:
                continue
            heads = _arrangement(key, keys)
            if heads is not None and heads == _arrangement(value, values):
                return handed, keys, values, heads
        return None

    def _owners(self, handed: _Handed) -> TwoSidedPlan:
        """The plan for a layer that reads its own keys: it comes last of all readers in a backward pass."""
        tell = self._plan.on_backward
        if tell is None:
            return self._plan

        def on_backward(layer: int, k: Tensor, v: Tensor, dk_far: Tensor, dv_far: Tensor) -> None:
            for dk, dv in handed.far:
                dk_far, dv_far = dk_far + dk, dv_far + dv
            handed.far.clear()
            tell(layer, k, v, dk_far, dv_far)

        return replace(self._plan, on_backward=on_backward)

    def _sharers(self, handed: _Handed) -> TwoSidedPlan:
        """The plan for a layer that reads another one's keys."""

        def on_backward(layer: int, k: Tensor, v: Tensor, dk_far: Tensor, dv_far: Tensor) -> None:
            handed.far.append((dk_far, dv_far))

        wants = self._plan.on_backward is not None
        return replace(self._plan, on_backward=on_backward if wants else None, on_forward=None)


def _arrangement(given: Tensor, handed: Tensor) -> Heads | None:
    """How the KV heads of handed states [B, H, T, D] stand in what attention is given; None if those are others."""
    n_heads, own = handed.shape[1], tuple(range(handed.shape[1]))
    if given is handed:
        return Heads((n_heads,), own)
    alike = given.dim() == 4 and (given.shape[0], *given.shape[2:]) == (handed.shape[0], *handed.shape[2:])
    if not alike or given.shape[1] % n_heads:
        return None
    times = given.shape[1] // n_heads
    with torch.no_grad():
        given, handed = given.detach(), handed.detach().to(given.dtype)
        # Each head for its group of query heads, or all heads again and again.
        if torch.equal(
            given.unflatten(1, (n_heads, times)), handed[:, :, None].expand(-1, -1, times, -1, -1)
        ):
            return Heads((given.shape[1],), tuple(head for head in own for _ in range(times)))
        if torch.equal(given.unflatten(1, (times, n_heads)), handed[:, None].expand(-1, times, -1, -1, -1)):
            return Heads((given.shape[1],), own * times)
    return None


def _mask(
    mask: Tensor | None, is_causal: bool, n_queries: int, n_keys: int, device: torch.device
) -> Tensor | None:
    """As `two_sided_attention` takes it: of four dimensions, None for causal attention."""
    if mask is None and is_causal and n_queries == n_keys:
        return None
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
        mask = mask.tril() if is_causal else mask
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(*mask.shape[:2], n_queries, n_keys)


@contextmanager
def through_sdpa(model: PreTrainedModel, plan: TwoSidedPlan) -> Iterator[Callable[[], dict[str, Any]]]:
    """As `two_sided`, for whatever model calls torch's `scaled_dot_product_attention`."""
    watch = _Watch(model, plan)
    with watch:
        yield watch.inputs
    watch.check_all_read()
