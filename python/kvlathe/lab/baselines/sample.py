"""Keys and values of calibration text, for the baselines that are calibrated themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibration.fisher import gradient_free_pass
from ...calibration.rope_probe import ModelShape, ProbeResult, RopeProbe, rotate
from ...progress import progress
from ..evaluation.size import SIDES

_TOKENS_KEPT = 256  # of a window, evenly spaced


def turned(x: Tensor, rope: RopeProbe | None, first: int, sign: int) -> Tensor:
    """Keys [B, H, T, D] of positions ``first``, ``first`` + 1, … with RoPE applied (sign 1) or undone (sign -1)."""
    if rope is None:
        return x
    positions = sign * torch.arange(first, first + x.shape[2], device=x.device)
    return rotate(x, positions, rope.inv_freq.to(x.device), rope.pairing).to(x.dtype)


class LayerSample:
    """What is kept of one layer; everything in float32 or wider, on the CPU.

    Attributes:
        count, total, gram: tokens times heads, sum [D] and second moment [D, D] of values and of keys (rotated, as
            the cache gets them), heads pooled.
        key_low, key_high: [H, D], the range of each channel of the keys before RoPE, over all tokens.
        keys, values: [H, n, D], a part of the tokens; keys before RoPE.
    """

    def __init__(self, shape: ModelShape) -> None:
        n_heads, dim = shape.n_kv_heads, shape.head_dim
        self.count = 0
        self.total = {side: torch.zeros(dim, dtype=torch.float64) for side in SIDES}
        self.gram = {side: torch.zeros(dim, dim, dtype=torch.float64) for side in SIDES}
        self.key_low = torch.full((n_heads, dim), math.inf)
        self.key_high = torch.full((n_heads, dim), -math.inf)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, k: Tensor, v: Tensor, rope: RopeProbe | None, first: int) -> None:
        """Keys and values [1, H, T, D], after RoPE, of positions ``first``, ``first`` + 1, …"""
        self.count += k.shape[1] * k.shape[2]
        for side, x in zip(SIDES, (k, v), strict=True):
            flat = x.flatten(0, 2).double()
            self.total[side] += flat.sum(0)
            self.gram[side] += flat.T @ flat
        still = turned(k, rope, first, -1)[0]
        self.key_low = torch.minimum(self.key_low, still.amin(1))
        self.key_high = torch.maximum(self.key_high, still.amax(1))
        step = max(1, k.shape[2] // _TOKENS_KEPT)
        self.keys.append(still[:, ::step].clone())
        self.values.append(v[0, :, ::step].clone())


def collect(
    model: PreTrainedModel, windows: Sequence[Tensor], probe: ProbeResult, n_sinks: int
) -> list[LayerSample]:
    """One forward pass over each window; one sample a layer.

    The first ``n_sinks`` tokens, which will stay exact, are left out: their keys are outliers that would widen every
    range (KVQuant, section 3.5, "attention sink-aware quantization").
    """
    layers = [LayerSample(probe.shape) for _ in range(probe.shape.n_layers)]

    def on_layer(layer: int, _q: Tensor, k: Tensor, v: Tensor) -> None:
        k, v = (x[:, :, n_sinks:].cpu().float() for x in (k, v))
        layers[layer].add(k, v, probe.ropes[layer], n_sinks)

    for window in progress(windows, "calibrating baselines", "window"):
        gradient_free_pass(model, window[None], on_layer)
    return layers
