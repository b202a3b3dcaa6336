"""The arithmetic of two-sided attention, apart from transformers; see `two_sided` for what it is for.

Everything is computed in float32 (float64 for float64 inputs), a chunk of queries at a time, so that the
scores of a long window never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CalibrationError, ShapeError

ForwardCallback = Callable[[int, Tensor, Tensor, Tensor], None]
BackwardCallback = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
Coder = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class TwoSidedPlan:
    """What two-sided attention does; every callback gets the layer's index first.

    Attributes:
        tail: number of latest tokens, a query's own included, that it reads exactly.
        n_sinks: number of first tokens that every query reads exactly.
        on_backward: ``(layer, k, v, dk_far, dv_far)``, all [B, n_kv_heads, T, D] in float32 or wider,
            detached: the keys and values of the layer and the gradients of the loss through far pairs, summed
            over the query heads of a group. Called once per layer and backward pass, last layer first; not for a
            layer that no gradient reaches.
        code_keys: ``(layer, k[B, n_kv_heads, T, D]) -> k_hat`` of the same shape, called once per layer and
            forward pass with all keys. None leaves the keys exact.
        code_values: the same for values. With either of the two, no gradient flows through attention.
        on_forward: ``(layer, q[B, n_heads, Tq, D], k, v)``, the queries and keys after RoPE.
        max_scores: the most attention scores (floats) held at once; the chunk of queries follows from it. The
            default, 4 MiB, stays in a CPU's cache: twice as fast as 32 MiB at 1,024 tokens.
    """

    tail: int = 128
    n_sinks: int = 4
    on_backward: BackwardCallback | None = None
    code_keys: Coder | None = None
    code_values: Coder | None = None
    on_forward: ForwardCallback | None = None
    max_scores: int = 1 << 20

    def __post_init__(self) -> None:
        if self.tail < 0 or self.n_sinks < 0:
            raise ShapeError(f"tail and n_sinks must not be negative, got {self.tail} and {self.n_sinks}")
        if self.max_scores < 1:
            raise ShapeError(f"max_scores must be positive, got {self.max_scores}")
        if self.on_backward is not None and (self.code_keys is not None or self.code_values is not None):
            raise CalibrationError(
                "a plan either hands out gradients (on_backward) or codes K and V, not both"
            )


@dataclass(frozen=True)
class _Call:
    """One attention call without its tensors."""

    plan: TwoSidedPlan
    layer_idx: int
    scaling: float
    softcap: float | None
    window: int | None  # sliding window to apply where no mask was given


@dataclass(frozen=True)
class _Chunk:
    """Queries [start, stop) and the key ranges that follow from them.

    Keys [0, lo) are near for all queries of the chunk, [lo, mid) far for all, [mid, hi) far for some, [hi,
    end) near for all. ``far`` is [stop - start, hi - mid], the split of the mixed range.
    """

    start: int
    stop: int
    lo: int
    mid: int
    hi: int
    end: int
    far: Tensor


def _chunks(call: _Call, q: Tensor, k: Tensor, causal: bool) -> Iterator[_Chunk]:
    """Cut the queries [B, H, Tq, D] so that a chunk's scores with k [B, Hkv, L, D] fit in ``max_scores``."""
    n_q, n_k = q.shape[2], k.shape[2]
    offset = n_k - n_q
    step = max(1, call.plan.max_scores // (q.shape[0] * q.shape[1] * n_k))
    for start in range(0, n_q, step):
        stop = min(n_q, start + step)
        end = min(n_k, offset + stop) if causal else n_k
        lo = min(call.plan.n_sinks, end)
        hi = max(lo, min(end, offset + stop - call.plan.tail))
        mid = max(lo, min(hi, offset + start - call.plan.tail + 1))
        q_pos = torch.arange(offset + start, offset + stop, device=q.device)
        far = q_pos[:, None] - torch.arange(mid, hi, device=q.device) >= call.plan.tail
        yield _Chunk(start, stop, lo, mid, hi, end, far)


def _probabilities(
    call: _Call,
    q: Tensor,
    k: Tensor,
    k_far: Tensor | None,
    mask: Tensor | None,
    s_aux: Tensor | None,
    chunk: _Chunk,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention probabilities of one chunk.

    Args:
        q: [B, Hkv, G, C, D], the chunk's queries; k, k_far: [B, Hkv, L, D]; mask: bool or additive, [B or 1,
            1 or H, Tq, >= L]; s_aux: [H], the logit of a learned sink that takes probability and gives
            nothing.

    Returns:
        P [B, Hkv, G, C, end]; with a softcap the factor d(capped)/d(score) of the same shape; with s_aux the
        probability of the learned sink [B, Hkv, G, C, 1]. A row that may see nothing (padding) is all zero.
    """
    batch, n_kv, group, n_q, dim = q.shape
    flat = (q * call.scaling).reshape(batch, n_kv, group * n_q, dim)

    def score(keys: Tensor, first: int, last: int) -> Tensor:
        return (flat @ keys[:, :, first:last].transpose(2, 3)).view(batch, n_kv, group, n_q, last - first)

    if k_far is None:
        scores = score(k, 0, chunk.end)
    else:
        mixed = torch.where(chunk.far, score(k_far, chunk.mid, chunk.hi), score(k, chunk.mid, chunk.hi))
        parts = [
            score(k, 0, chunk.lo),
            score(k_far, chunk.lo, chunk.mid),
            mixed,
            score(k, chunk.hi, chunk.end),
        ]
        scores = torch.cat(parts, dim=-1)
    slope = None
    if call.softcap is not None:
        squashed = torch.tanh(scores / call.softcap)
        slope = 1 - squashed.square()
        scores = squashed * call.softcap
    if mask is not None:
        part = mask[:, :, chunk.start : chunk.stop, : chunk.end]
        part = part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, (n_kv, group))
        scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
    else:
        # Causal chunks end with their last query's own key.
        q_pos = torch.arange(chunk.end - n_q, chunk.end, device=q.device)[:, None]
        k_pos = torch.arange(chunk.end, device=q.device)
        hidden = k_pos > q_pos
        if call.window is not None:
            hidden = hidden | (q_pos - k_pos >= call.window)
        scores = scores.masked_fill(hidden, -math.inf)
    top = scores.amax(dim=-1, keepdim=True)
    sink = None
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, n_kv, group, 1, 1)
        top = torch.maximum(top, sink)
    # A row that sees nothing has top = -inf; -inf - -inf would be NaN.
    top = top.clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sink is not None:
        sink = torch.exp(sink - top)
        total = total + sink
    total = total.clamp_min(torch.finfo(scores.dtype).tiny)
    return weights / total, slope, None if sink is None else sink / total


def _group(x: Tensor, n_kv: int, chunk: _Chunk) -> Tensor:
    """[B, H, Tq, D] to the chunk's [B, Hkv, G, C, D]."""
    return x[:, :, chunk.start : chunk.stop].unflatten(1, (n_kv, x.shape[1] // n_kv))


def _weigh(p: Tensor, v: Tensor, v_far: Tensor | None, chunk: _Chunk) -> Tensor:
    """P [B, Hkv, G, C, end] times the values that each pair reads: [B, Hkv, G, C, D]."""
    batch, n_kv, group, n_q, _ = p.shape
    near = p
    out = p.new_zeros(())
    if v_far is not None:
        split = p[..., chunk.lo : chunk.hi].clone()
        split[..., chunk.mid - chunk.lo :].masked_fill_(~chunk.far, 0)
        near = p.clone()
        near[..., chunk.lo : chunk.hi] -= split
        out = split.flatten(2, 3) @ v_far[:, :, chunk.lo : chunk.hi]
    out = out + near.flatten(2, 3) @ v[:, :, : chunk.end]
    return out.view(batch, n_kv, group, n_q, v.shape[-1])


def _attend(
    call: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_far: Tensor | None,
    v_far: Tensor | None,
    mask: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention output [B, H, Tq, D]; all tensors in the working dtype."""
    n_kv = k.shape[1]
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for chunk in _chunks(call, q, k, causal=mask is None):
        p, _, _ = _probabilities(call, _group(q, n_kv, chunk), k, k_far, mask, s_aux, chunk)
        out[:, :, chunk.start : chunk.stop] = _weigh(p, v, v_far, chunk).flatten(1, 2)
    return out


class _ExactWithFarGradients(torch.autograd.Function):
    """Exact attention whose backward pass also reports the gradients of K and V through far pairs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, mask: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, s_aux, mask)
        ctx.call = call
        return _attend(call, q, k, v, None, None, mask, s_aux)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, s_aux, mask = ctx.saved_tensors
        call: _Call = ctx.call
        n_kv = k.shape[1]
        d_out = grads[0]
        dq = torch.empty_like(q)
        dk, dv, dk_far, dv_far = (torch.zeros_like(x) for x in (k, v, k, v))
        d_aux = None if s_aux is None else torch.zeros_like(s_aux)
        for chunk in _chunks(call, q, k, causal=mask is None):
            q_c = _group(q, n_kv, chunk)
            do = _group(d_out, n_kv, chunk).flatten(2, 3)
            # Probabilities are computed again: keeping them would cost T x T floats per head and layer.
            p, slope, p_sink = _probabilities(call, q_c, k, None, mask, s_aux, chunk)
            dp = (do @ v[:, :, : chunk.end].transpose(2, 3)).view_as(p)
            mean = (p * dp).sum(dim=-1, keepdim=True)
            if d_aux is not None and p_sink is not None:
                d_aux -= (p_sink * mean).sum(dim=(0, 3, 4)).flatten().to(d_aux.dtype)
            ds = p * (dp - mean) * call.scaling
            if slope is not None:
                ds *= slope
            ds, p, q_c = ds.flatten(2, 3), p.flatten(2, 3), q_c.flatten(2, 3)
            dq_c = (ds @ k[:, :, : chunk.end]).view(
                *q.shape[:1], n_kv, -1, chunk.stop - chunk.start, q.shape[-1]
            )
            dq[:, :, chunk.start : chunk.stop] = dq_c.flatten(1, 2)
            dk[:, :, : chunk.end] += ds.transpose(2, 3) @ q_c
            dv[:, :, : chunk.end] += p.transpose(2, 3) @ do
            if chunk.hi > chunk.lo:
                # ds and p are not needed any more: cut the near pairs out of them in place.
                near = ~chunk.far.repeat(q.shape[1] // n_kv, 1)
                for whole, other, total in ((ds, q_c, dk_far), (p, do, dv_far)):
                    whole[..., chunk.mid : chunk.hi].masked_fill_(near, 0)
                    far = whole[..., chunk.lo : chunk.hi]
                    total[:, :, chunk.lo : chunk.hi] += far.transpose(2, 3) @ other
        # Operators without a derivative, such as those of some quantised layers, pass zeros on and do not fail.
        if call.plan.on_backward is not None and d_out.any():
            call.plan.on_backward(call.layer_idx, k.detach(), v.detach(), dk_far, dv_far)
        return dq, dk, dv, d_aux, None, None


def two_sided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TwoSidedPlan,
    *,
    layer_idx: int,
    scaling: float | None = None,
    attention_mask: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention as ``plan`` says.

    Args:
        query: [B, H, Tq, D]; key, value: [B, Hkv, L, D] with H a multiple of Hkv.
        attention_mask: bool (True = may see) or additive, [B or 1, 1 or H, Tq, >= L]; None means causal with
            the last query at the last key, within ``sliding_window`` if given.
        scaling: factor of the scores, 1/sqrt(D) by default.
        softcap: caps scores at softcap * tanh(score / softcap), before the mask (Gemma 2).
        s_aux: [H], logits of learned sinks (gpt-oss).

    Returns:
        [B, H, Tq, D] in the dtype of ``query``.

    Raises:
        ShapeError: shapes that do not fit, also those returned by a coder.
    """
    n_heads, n_kv = query.shape[1], key.shape[1]
    if n_heads % n_kv or query.shape[3] != key.shape[3] or key.shape[:3] != value.shape[:3]:
        raise ShapeError(
            f"q {tuple(query.shape)}, k {tuple(key.shape)} and v {tuple(value.shape)} do not fit each other"
        )
    if query.shape[2] > key.shape[2]:
        raise ShapeError(f"{query.shape[2]} queries but only {key.shape[2]} keys")
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    call = _Call(plan, layer_idx, scaling, softcap, sliding_window)
    q, k, v = query.to(work), key.to(work), value.to(work)
    if plan.on_forward is not None:
        plan.on_forward(layer_idx, q.detach(), k.detach(), v.detach())
    if plan.code_keys is None and plan.code_values is None and torch.is_grad_enabled():
        out = _ExactWithFarGradients.apply(q, k, v, s_aux, attention_mask, call)
        return out.to(query.dtype)
    coded: list[Tensor | None] = []
    for coder, exact in ((plan.code_keys, k), (plan.code_values, v)):
        far = None if coder is None else coder(layer_idx, exact.detach()).to(work)
        if far is not None and far.shape != exact.shape:
            raise ShapeError(
                f"a coder of layer {layer_idx} turned {tuple(exact.shape)} into {tuple(far.shape)}"
            )
        coded.append(far)
    with torch.no_grad():
        out = _attend(call, q, k, v, coded[0], coded[1], attention_mask, s_aux)
    return out.to(query.dtype)
