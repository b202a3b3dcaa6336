"""Attention over lazy keys and values, by the contract of torch's `scaled_dot_product_attention`.

The contract is honoured whole, or the call is handed back with the reason, to be made with ordinary tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .heads import query_order, serving
from .masks import sight
from .watchers import is_watched

if TYPE_CHECKING:
    from .states import LazyStates


@dataclass(frozen=True)
class Refusal:
    """Why attention is not served from the blocks, as words that follow "attention was given"."""

    reason: str


_ORDINARY = (Tensor, nn.Parameter)


def attend(
    query: Tensor,
    key: LazyStates,
    value: LazyStates,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    sink_scores: Tensor | None = None,
) -> Tensor | Refusal:
    """Attention of queries [B, Hq, q, D], from the blocks: [B, Hq, q, Dv].

    Args:
        softcap, sink_scores: beyond torch's contract: a cap on scores, and a score a query head beside them.
        Others: torch's.

    Raises:
        CacheStateError: the cache has gone on, and what the keys stood for could not be kept.
        ResourceError: no memory; the cache is as it was.
    """
    handout = key.handout
    heads = key.heads
    # Alike, most are the same object.
    alike = heads is value.heads or heads == value.heads
    if handout is not value.handout or key.side != "key" or value.side != "value" or not alike:
        return Refusal("keys and values that do not belong together")
    if type(query) not in _ORDINARY:
        return Refusal(f"queries that are of the type {type(query).__name__}")
    if dropout_p:
        return Refusal("dropout (call model.eval() where you need none)")
    if is_watched():
        return Refusal(
            "queries of a transform or a trace (torch.func, torch.jit, make_fx, forward-mode gradients)"
        )
    wants_graph = query.requires_grad or (sink_scores is not None and sink_scores.requires_grad)
    if wants_graph and torch.is_grad_enabled():
        return Refusal("queries with gradients (use torch.no_grad() where you need none)")
    shape, key_shape = query.shape, key.shape
    fits = len(shape) == 4 and shape[0] == key_shape[0] and shape[3] == key_shape[-1]
    if not fits or 0 in shape or query.device != key.device:
        return Refusal("queries of another shape or on another device than keys")
    dtype = _dtype_of_output(query, key, value)
    if dtype is None:
        return Refusal("queries, keys and values of different number formats")
    batch, n_query_heads, n_queries, dim = shape
    kv_heads = serving(heads, n_query_heads, enable_gqa)
    order = None if kv_heads is None else query_order(kv_heads, handout.n_kv_heads)
    if order is None:
        return Refusal("query heads that do not share KV heads evenly")
    n_tokens, window = key_shape[-2], handout.window
    seen = sight(
        attn_mask, is_causal, handout.memo, batch=batch, n_queries=n_queries, n_tokens=n_tokens, window=window
    )
    if seen is None:
        return Refusal("a mask that differs from head to head, or adds other numbers than 0 and −∞ to scores")
    # What native code takes: no graph, the numbers of what is held, as they are in memory.
    queries = query.detach() if wants_graph else query
    if queries.dtype != handout.dtype:
        queries = queries.to(handout.dtype)
    if queries.is_neg() or queries._is_zerotensor():
        queries = queries.clone()
    if order:
        queries = queries[:, list(order)]
        sink_scores = None if sink_scores is None else sink_scores[list(order)]
    mask = seen.mask
    needs_rows = n_queries > 1 and seen.kind != "causal"
    folds = needs_rows and (mask is None or mask.shape[2] == 1) and n_tokens == handout.n_shown_to(1)
    if not folds and (n_tokens != handout.n_shown_to(n_queries) or n_queries > n_tokens):
        return Refusal("other queries than those of the newest tokens")
    if folds:
        # All queries see the same: as heads of one query, the newest, they need no row of a mask each.
        queries = queries.reshape(batch, n_query_heads * n_queries, 1, dim)
        if sink_scores is not None:
            sink_scores = sink_scores.repeat_interleave(n_queries)
    elif needs_rows:
        rows = torch.ones(1, 1, 1, n_tokens, dtype=torch.bool, device=query.device) if mask is None else mask
        mask = rows.expand(-1, -1, n_queries, -1)
    scaling = dim**-0.5 if scale is None else scale
    out = handout.attend(queries, mask=mask, scaling=scaling, softcap=softcap, sink_scores=sink_scores)
    # [B, q, Hq, D] in memory, which is what models want next.
    out = out.view(batch, n_query_heads, n_queries, -1) if folds else out.transpose(1, 2)
    if order:
        out = out[:, _inverse(order)]
    return out if out.dtype == dtype else out.to(dtype)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _dtype_of_output(query: Tensor, key: Any, value: Any) -> torch.dtype | None:
    """What torch's SDPA would return; None where it would refuse."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        cast = all(states.dtype != torch.float64 for states in (query, key, value))
        return torch.get_autocast_dtype(device) if cast else None
    return query.dtype if query.dtype == key.dtype == value.dtype else None
