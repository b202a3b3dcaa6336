"""What an attention mask shows, found once for all layers that share it.

A mask that only says what attention from the blocks takes for granted (causal, the last query at the last token; or
everything) is none: making out which tokens to leave away, in every layer, takes longer than knowing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sight:
    """Which tokens queries see.

    Attributes:
        kind: "all" of them; "causal", the last query at the last token, and within the window if there is one;
            "masked", what ``mask`` shows.
        mask: bool [1 or B, 1, 1 or q, tokens], True = seen.
    """

    kind: str
    mask: Tensor | None = None


ALL, CAUSAL = Sight("all"), Sight("causal")


class PassMemo:
    """What was found of tensors in one pass through a model: its layers share their masks.

    It is gone with the pass, so that nothing that somebody writes between passes, past torch's counts, is overlooked.
    """

    def __init__(self) -> None:
        # Beside what was found: the tensor's memory, by the tensor that owns it, and how it is looked at.
        self._kept: list[tuple[ref[Tensor], Any, Any]] = []

    def find(self, function: Callable[..., Found], tensor: Tensor, *more: Any) -> Found:
        """``function(tensor, *more)``, once for views of one tensor that look the same.

        What it finds must not hold the tensor's own memory, or nobody would ever let go of it.
        """
        base = tensor._base
        anchor = tensor if base is None else base
        # Inference tensors count no versions.
        version = None if anchor.is_inference() else anchor._version
        looks = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
        look = (function, version, *looks, *more)
        for held, seen, found in self._kept:
            if held() is anchor and seen == look:
                return found
        new = function(tensor, *more)
        self._kept.append((ref(anchor), look, new))
        return new


def causal_mask(
    n_queries: int, n_tokens: int, *, window: int | None = None, first: int = 0, end: int | None = None
) -> Tensor:
    """Whether queries, the last one at the last token, see the tokens from ``first`` on to the ``end``-th (the last):
    bool [q, end − first]. Of a window its tokens only.
    """
    places = torch.arange(n_tokens - n_queries, n_tokens)[:, None]
    tokens = torch.arange(first, n_tokens if end is None else end)
    seen = tokens <= places
    return seen if window is None else seen & (tokens > places - window)


def _as_bool(mask: Tensor) -> Tensor | None:
    """A mask that is added to scores, as one of what is seen; None if it does more than hide.

    The lowest number of a format hides as −∞ does where its row shows anything: e^(lowest − 0) is 0.
    """
    seen = mask == 0
    if bool((seen | (mask == -torch.inf)).all()):
        return seen
    lowest = torch.finfo(mask.dtype).min
    hides = bool((seen | (mask <= lowest / 2)).all()) and bool(seen.any(-1).all())
    return seen if hides else None


def _as_four(mask: Tensor) -> Tensor:
    """The same mask with four dimensions, those that only repeat it being of size 1."""
    while mask.dim() < 4:
        mask = mask[None]
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


# For a mask that is what native code takes: it is not kept, but looked at anew.
_AS_GIVEN = Sight("masked")


def _look(mask: Tensor, batch: int, n_queries: int, n_tokens: int, window: int | None) -> Sight | None:
    given = mask
    if mask.dim() > 4 or mask.requires_grad or mask.device.type != "cpu":
        return None
    mask = _as_four(mask)
    rows, heads, queries, tokens = mask.shape
    if rows not in (1, batch) or heads != 1 or queries not in (1, n_queries) or tokens not in (1, n_tokens):
        return None
    if mask.dtype != torch.bool:
        seen = _as_bool(mask) if mask.is_floating_point() else None
        if seen is None:
            return None
        mask = seen
    if tokens != n_tokens:
        mask = mask.expand(-1, -1, -1, n_tokens)
    # Over bytes, as `all` of booleans takes twenty times as long.
    if bool(mask.view(torch.uint8).amin()):
        return ALL
    if queries == n_queries and n_queries <= n_tokens:
        expected = causal_mask(n_queries, n_tokens, window=window)
        if torch.equal(mask, expected.expand_as(mask)):
            return CAUSAL
    mask = mask.contiguous()
    return _AS_GIVEN if mask.data_ptr() == given.data_ptr() else Sight("masked", mask)


def sight(
    mask: Tensor | None,
    is_causal: bool,
    memo: PassMemo,
    *,
    batch: int,
    n_queries: int,
    n_tokens: int,
    window: int | None,
) -> Sight | None:
    """What queries see by the arguments of torch's SDPA; None for a mask that does more than show and hide, the same
    for all heads.

    Args:
        mask: None, or bool or float, broadcast to [B, heads, q, tokens].
        is_causal: torch's: the first query at the first token.
        memo: of the pass.
        window: tokens that a query of this layer sees, its own included; None for all.
    """
    if is_causal:
        if mask is not None:
            return None  # an error of torch's
        if n_queries == n_tokens and window is None:
            return CAUSAL
        return Sight("masked", torch.ones(n_queries, n_tokens, dtype=torch.bool).tril()[None, None])
    if mask is None:
        return ALL
    seen = memo.find(_look, mask, batch, n_queries, n_tokens, window)
    return Sight("masked", _as_four(mask)) if seen is _AS_GIVEN else seen
