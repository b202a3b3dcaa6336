"""llama.cpp's cache types q8_0 and q4_0 (--cache-type-k, ggml-quants.c), and q4_0 after a Hadamard rotation.

A token's row, all KV heads one after another, is cut into blocks of 32 numbers with one float16 scale d each::

    q8_0    d = max|x| / 127                               q = round(x/d)               x̂ = d·q         8.5 bits
    q4_0    d = (x of largest magnitude, signed) / -8      q = min(15, ⌊x/d + 8.5⌋)     x̂ = d·(q - 8)   4.5 bits

Codes are chosen with d in float32 and read with d in float16, as there.

The rotated variant codes H·x and returns Hᵀ of what comes back, with H the normalised Walsh-Hadamard matrix of
head_dim. For keys that is the same as rotating query and key both: (Hq)·(Hk) = q·k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.rope_probe import ModelShape
from ...preset import Side
from .baseline import Baseline, in_float16

BLOCK = 32


def q8_0(x: Tensor) -> Tensor:
    """[..., n blocks of 32] coded and decoded."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    codes = scaled.sign() * (scaled.abs() + 0.5).floor()  # roundf: halves away from zero
    return (in_float16(d) * codes).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    """[..., n blocks of 32] coded and decoded."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * _inverse(d) + 8.5).floor().clamp_max(15)
    return (in_float16(d) * (codes - 8)).flatten(-2)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def hadamard(n: int) -> Tensor:
    """The normalised Walsh-Hadamard matrix [n, n] (Sylvester's order), float32; n a power of two.

    A size that is none gets a block-diagonal matrix of the largest power of two that divides it.
    """
    block = n & -n
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h / block**0.5] * (n // block))


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """[B, H, T, D] to rows [B, T, H·D], padded with zeros to whole blocks, and the padding's length."""
    rows = x.transpose(1, 2).flatten(2)
    padding = -rows.shape[-1] % BLOCK
    return torch.nn.functional.pad(rows, (0, padding)), padding


class LlamaCpp(Baseline):
    """Rows of blocks of 32."""

    family = "llama.cpp"

    def __init__(self, shape: ModelShape, bits: int) -> None:
        super().__init__(shape)
        self.name = f"q{bits}_0"
        self._code_rows = {8: q8_0, 4: q4_0}[bits]
        self._block_bytes = 2 + BLOCK * bits // 8

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        rows, padding = _rows(x)
        coded = self._code_rows(rows)[..., : rows.shape[-1] - padding]
        return coded.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        return n_tokens * -(-self.values_a_token // BLOCK) * self._block_bytes


class RotatedLlamaCpp(LlamaCpp):
    """The same after a Hadamard rotation of every head's vector."""

    family = "llama.cpp + Hadamard"

    def __init__(self, shape: ModelShape, bits: int) -> None:
        super().__init__(shape, bits)
        self.name += "-hadamard"
        self._rotation = hadamard(shape.head_dim)

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        rotation = self._rotation.to(x)
        return super().code(layer, side, x @ rotation, position) @ rotation.T
