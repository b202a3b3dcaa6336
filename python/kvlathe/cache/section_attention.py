"""Attention of many queries through torch's own kernel, over a section of expanded tokens at a time.

Where torch multiplies bfloat16 on AMX tiles, that is faster for a chunk of a prompt than the native float32 kernels,
the expanding included (docs/speed.md). Sections are of bounded size, however long the context; what they contribute is
joined by its log-sum-exp, as in split-k flash decoding:

    L = log(e^l₁ + e^l₂),  out = e^(l₁ − L)·out₁ + e^(l₂ − L)·out₂
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

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
    """Whether `attend` is faster for queries [B, Hq, q, D] than the native kernels."""
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


def _seen_by_all(mask: Tensor | None, n_tokens: int, n_queries: int) -> Tensor:
    """Which tokens every query sees, [1 or B, n_tokens]."""
    if mask is None:
        return torch.arange(n_tokens)[None] <= n_tokens - n_queries
    # Over bytes, as `all` takes twenty times as long.
    return mask[:, 0].view(torch.uint8).amin(1) != 0


def causal_mask(
    n_queries: int, n_tokens: int, first: int, end: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Whether queries, the last one at the last of ``n_tokens``, see the tokens from ``first`` on to the ``end``-th,
    bool [1, 1, q, end − first].
    """
    places = torch.arange(n_tokens - n_queries, n_tokens, device=device)
    return (torch.arange(first, end, device=device) <= places[:, None])[None, None]


def attend(
    queries: Tensor,
    read: Callable[[int, int], tuple[Tensor, Tensor]],
    *,
    n_tokens: int,
    n_kv_heads: int,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of queries [B, Hq, q, D] over ``n_tokens`` tokens: [B, q, Hq, D], zeros where a query sees none.

    Args:
        read: expands the tokens from one on to another: keys and values [B, Hkv, tokens, D].
        mask: bool [1 or B, 1, q, n_tokens], True = seen; None is causal, the last query at the last token.
    """
    batch, n_query_heads, n_queries, dim = queries.shape
    # The queries of a KV head's group as those of one head: torch packs keys and values once for all of them.
    folded = queries.detach().reshape(batch, n_kv_heads, -1, dim)
    seen_by_all = _seen_by_all(mask, n_tokens, n_queries)
    out, total = torch.empty(0), torch.empty(0)
    for first, end in _sections(n_tokens, n_queries, seen_by_all):
        keys, values = read(first, end)
        if bool(seen_by_all[:, first:end].all()):
            found, sums = _flash(folded, keys, values, None, scaling)
        else:
            seen = causal_mask(n_queries, n_tokens, first, end) if mask is None else mask[..., first:end]
            found, sums = _masked(folded, keys, values, seen, scaling)
        if first == 0:
            out, total = found.float(), sums
            continue
        joined = torch.logaddexp(total, sums)
        # −∞ for a query that has seen nothing so far: −∞ − 0, not −∞ − (−∞).
        largest = joined.masked_fill(joined == -torch.inf, 0.0)
        out.mul_((total - largest).exp_()[..., None])
        out.addcmul_(found.float(), (sums - largest).exp_()[..., None])
        total = joined
    by_head = out.view(batch, n_query_heads, n_queries, dim).to(queries.dtype)
    return by_head.transpose(1, 2).contiguous()


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


def _flash(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """softmax(q·k · scaling + hidden)·v, and the log of the softmax's sum."""
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, False, attn_mask=hidden, scale=scaling
    )
    return found, sums
