"""Attention over a section of expanded tokens at a time: what every store can do, on any device.

It is also the fastest way for a chunk of a prompt where torch multiplies bfloat16 on AMX tiles, the expanding included
(docs/speed.md). Sections are of bounded size, however long the context; what they contribute is joined by its
log-sum-exp, as in split-k flash decoding:

    L = log(e^l₁ + e^l₂),  out = e^(l₁ − L)·out₁ + e^(l₂ − L)·out₂
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..errors import ShapeError
from ..lazy import causal_mask
from .store import Attention, Store

# Keys and values of 2 KV heads of 64 components: 2 MB. Shorter sections make torch's products slower.
_MOST_TOKENS = 4096
# Scores of one query head and section, which is also the size of a section's mask.
_MOST_SCORES = 1 << 21
_LEAST_TOKENS = 512
# Queries of one KV head (a group's queries count each) from which on expanding pays.
_MIN_QUERIES = 384


@cache
def on_amx() -> bool:
    """Whether torch multiplies bfloat16 on AMX tiles; a lower instruction set that `KVLATHE_ISA` forces is obeyed."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    forced = bool(os.environ.get("KVLATHE_ISA"))
    return bool(supported and supported()) and torch.backends.mkldnn.is_available() and not forced


def pays(queries: Tensor, n_kv_heads: int) -> bool:
    """Whether `attend` is faster than the native kernels for queries [B, Hq, q, D]."""
    _, n_query_heads, n_queries, _ = queries.shape
    many = n_query_heads // n_kv_heads * n_queries >= _MIN_QUERIES
    return many and queries.dtype == torch.bfloat16 and on_amx()


def _sections(n_tokens: int, n_queries: int, seen_by_all: Tensor) -> Iterator[tuple[int, int]]:
    """First tokens and ends, with borders where the tokens [B, n_tokens] that every query sees begin and end: behind
    padding, or what has left the window of a later query, and before the queries' own tokens.
    """
    most = min(_MOST_TOKENS, max(_LEAST_TOKENS, _MOST_SCORES // n_queries))
    own = n_tokens - n_queries
    behind = int((~seen_by_all[:, :own].all(0)).sum())
    for start, stop in ((0, behind), (behind, own), (own, n_tokens)):
        # Of nearly equal length: short ones are slow.
        n_sections = -(-(stop - start) // most)
        for i in range(n_sections):
            first, end = (start + (stop - start) * at // n_sections for at in (i, i + 1))
            yield first, end


def _seen_by_all(mask: Tensor | None, n_tokens: int, n_queries: int, device: torch.device) -> Tensor:
    """Which tokens every query sees, [1 or B, n_tokens]."""
    if mask is None:
        return torch.arange(n_tokens, device=device)[None] <= n_tokens - n_queries
    # Over bytes, as `all` takes twenty times as long.
    return mask[:, 0].view(torch.uint8).amin(1) != 0


def attend(
    store: Store,
    queries: Tensor,
    n_kv_heads: int,
    *,
    n_tokens: int,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sink_scores: Tensor | None = None,
) -> Attention:
    """As `Store.attend`, whose ``n_tokens`` and mask these are; zeros where a query sees nothing.

    Raises:
        ShapeError: a mask of another shape.
    """
    batch, n_query_heads, n_queries, dim = queries.shape
    policy, device = store.policy, queries.device
    first_seen = policy.first_seen(n_tokens - n_queries)
    n_seen = n_tokens - first_seen
    if mask is not None and (mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, n_queries, n_seen)):
        raise ShapeError(
            f"the attention mask has the shape {list(mask.shape)}, expected [1 or {batch}, 1, {n_queries}, {n_seen}]"
        )
    if mask is None and policy.window is not None:
        mask = causal_mask(n_queries, n_seen, window=policy.window).to(device)[None, None]
    # The queries of a KV head's group as those of one head: torch packs keys and values once for all of them.
    folded = queries.detach().reshape(batch, n_kv_heads, -1, dim)
    seen_by_all = _seen_by_all(mask, n_seen, n_queries, device)
    out, lse = torch.empty(0), torch.empty(0)
    for first, end in _sections(n_seen, n_queries, seen_by_all):
        keys, values = store.read(first_seen + first, first_seen + end, n_tokens=n_tokens)
        seen = None
        if not bool(seen_by_all[:, first:end].all()):
            if mask is None:
                seen = causal_mask(n_queries, n_seen, first=first, end=end).to(device)[None, None]
            else:
                seen = mask[..., first:end]
        if softcap is not None or device.type != "cpu" or keys.shape[-1] != values.shape[-1]:
            found, sums = _plain(folded, keys, values, seen, scaling, softcap)
        elif seen is None:
            found, sums = _flash(folded, keys, values, None, scaling)
        else:
            found, sums = _masked(folded, keys, values, seen, scaling)
        if first == 0:
            out, lse = found.float() if found.dtype.itemsize < 4 else found, sums
            continue
        joined = torch.logaddexp(lse, sums)
        _rescale(out, lse, joined)
        out.addcmul_(found.to(out.dtype), (sums - _finite(joined)).exp_()[..., None])
        lse = joined
    if sink_scores is not None:
        scores = sink_scores.to(lse.dtype).view(1, n_kv_heads, -1, 1).expand(-1, -1, -1, n_queries).flatten(2)
        joined = torch.logaddexp(lse, scores)
        _rescale(out, lse, joined)
        lse = joined
    by_head = out.view(batch, n_query_heads, n_queries, -1).to(queries.dtype)
    return Attention(
        by_head.transpose(1, 2).contiguous(), lse.reshape(batch, n_query_heads, n_queries).float()
    )


def _finite(lse: Tensor) -> Tensor:
    """−∞ for a query that has seen nothing so far: −∞ − 0, not −∞ − (−∞)."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _rescale(out: Tensor, lse: Tensor, joined: Tensor) -> None:
    """Weights that were relative to one sum are made relative to another, in place."""
    out.mul_((lse - _finite(joined)).exp_()[..., None])


def _masked(
    folded: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """A section that some queries [B, Hkv, group · q, D] do not see all of: its attention and log-sum-exp."""
    batch, n_kv_heads, n_rows, dim = folded.shape
    n_queries = seen.shape[2]
    # A group's query heads again, all with the same keys: so one mask serves them all.
    spread = folded.reshape(batch * n_kv_heads, -1, n_queries, dim)
    keys, values = (
        states.flatten(0, 1)[:, None].expand(-1, spread.shape[1], -1, -1) for states in (keys, values)
    )
    if seen.shape[0] > 1:
        seen = seen.repeat_interleave(n_kv_heads, 0)
    hidden = torch.zeros(seen.shape, dtype=folded.dtype).masked_fill_(~seen, -torch.inf)
    found, sums = _flash(spread, keys, values, hidden, scaling)
    blind = ~seen.any(-1)
    # What torch returns for queries that see nothing differs between versions.
    found = found.masked_fill(blind[..., None], 0.0).reshape(folded.shape)
    return found, sums.masked_fill(blind, -torch.inf).reshape(batch, n_kv_heads, n_rows)


def _plain(
    folded: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `_masked`, or without a mask, in torch's elementary operations, which every device has."""
    wide = torch.promote_types(folded.dtype, torch.float32)
    scores = folded.to(wide) @ keys.to(wide).mT
    scores.mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if seen is not None:
        by_head = scores.unflatten(2, (-1, seen.shape[2]))
        by_head.masked_fill_(~seen[:, :, None], -torch.inf)
    sums = scores.logsumexp(-1)
    return scores.sub_(_finite(sums)[..., None]).exp_() @ values.to(wide), sums


def _flash(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """softmax(q·k · scaling + hidden)·v, and the log of the softmax's sum."""
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, False, attn_mask=hidden, scale=scaling
    )
    return found, sums
