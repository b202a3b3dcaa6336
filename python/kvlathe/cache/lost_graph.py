"""Held tokens whose graph is gone: a loss behind them cannot reach what they were computed from, and says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GradientError


class _LostGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, anchor: Tensor, n_tokens: int) -> Tensor:
        ctx.n_tokens = n_tokens
        return held.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GradientError(
            f"this loss has gradients with respect to {ctx.n_tokens} tokens that the cache held, and a compressed "
            f"cache keeps no graph: read those tokens under torch.no_grad(), or keep them in a DynamicCache"
        )


def with_lost_graph(held: Tensor, n_tokens: int) -> Tensor:
    """Held keys or values, ``n_tokens`` of which were computed with gradients.

    Returns:
        The same numbers; a backward pass through them raises `GradientError`.
    """
    found: Tensor = _LostGraph.apply(held, torch.zeros((), requires_grad=True), n_tokens)
    return found
