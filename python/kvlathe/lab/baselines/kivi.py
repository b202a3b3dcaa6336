"""KIVI (Liu et al., 2024, arXiv 2402.02750): keys per channel, values per token, asymmetric, groups of 32.

A group of numbers with least and largest values lo and hi is stored as b-bit codes, a scale and a zero point, both
in float16::

    s = (hi - lo) / (2^b - 1)        q = round((x - lo) / s)        x̂ = s·q + lo

For keys a group is one channel of 32 tokens, for values 32 channels of one token. That is 1 bit a value on top of b.
KIVI's residual, the newest tokens in full precision, is the evaluation's tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...calibration.rope_probe import ModelShape
from ...preset import Side
from .baseline import Baseline, in_float16, packed_bytes

GROUP = 32


def asymmetric(x: Tensor, bits: int, dim: int) -> Tensor:
    """Code and decode x with one scale and zero point for each group along ``dim``."""
    lo = x.amin(dim, keepdim=True)
    scale = (x.amax(dim, keepdim=True) - lo) / (2**bits - 1)
    stored_lo, stored_scale = in_float16(lo), in_float16(scale)
    # The codes are chosen for the stored scale; a constant group has none.
    steps = (x - stored_lo) / torch.where(stored_scale == 0, torch.ones_like(scale), stored_scale)
    return stored_scale * steps.round().clamp(0, 2**bits - 1) + stored_lo


class Kivi(Baseline):
    """KIVI at 2 or 4 bits."""

    family = "KIVI"
    group_len = GROUP

    def __init__(self, shape: ModelShape, bits: int) -> None:
        super().__init__(shape)
        self.name = f"kivi-{bits}"
        self._bits = bits
        # Smaller where a head is no multiple of 32.
        self._value_group = math.gcd(GROUP, shape.head_dim)

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        if side == "key":
            return asymmetric(x.unflatten(2, (-1, GROUP)), self._bits, dim=3).flatten(2, 3)
        return asymmetric(x.unflatten(3, (-1, self._value_group)), self._bits, dim=4).flatten(3)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        n_values = n_tokens * self.values_a_token
        group = GROUP if side == "key" else self._value_group
        return packed_bytes(n_values, self._bits) + n_values // group * 4
