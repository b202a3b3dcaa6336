"""TurboQuant, the variant for least squared error (Zandieh et al., 2025, arXiv 2504.19874, algorithm 1).

A vector is divided by its norm (kept in float16), turned by one random rotation Π, and every coordinate is rounded to
the nearest level of a b-bit codebook::

    y = Π·x/‖x‖        q_j = argmin_k |y_j - c_k|        x̂ = ‖x‖·Πᵀ·c[q]

The codebook is Lloyd-Max's for a coordinate of a random unit vector, whose density on [-1, 1] is proportional to
(1 - t²)^((d - 3)/2), close to N(0, 1/d). The norm adds 16/d bits a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...calibration.rope_probe import ModelShape
from ...preset import Side
from .baseline import Baseline, in_float16, packed_bytes
from .lloyd_max import lloyd_max, nearest

_GRID = 1 << 17


def codebook(head_dim: int, bits: int) -> Tensor:
    """Levels [2^bits], float64, for a coordinate of a random unit vector of ``head_dim`` (at least 3) components."""
    # Beyond eight standard deviations, 1/√d each, there is nothing.
    reach = min(1.0, 8 / head_dim**0.5)
    t = torch.linspace(-reach, reach, _GRID + 1, dtype=torch.float64)
    return lloyd_max(t, (1 - t**2).clamp_min(0) ** ((head_dim - 3) / 2), 2**bits)


def random_rotation(n: int, seed: int = 0) -> Tensor:
    """A uniformly random orthogonal matrix [n, n], float32 (QR of a Gaussian matrix; Mezzadri 2007)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


class TurboQuant(Baseline):
    """TurboQuant at b bits."""

    family = "TurboQuant"

    def __init__(self, shape: ModelShape, bits: int) -> None:
        super().__init__(shape)
        self.name = f"turboquant-{bits}"
        self._bits = bits
        self._levels = codebook(shape.head_dim, bits)
        self._rotation = random_rotation(shape.head_dim)

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        rotation = self._rotation.to(x)
        norm = x.norm(dim=-1, keepdim=True)
        y = (x / norm.clamp_min(1e-30)) @ rotation.T
        return in_float16(norm) * (nearest(y, self._levels) @ rotation)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        return n_tokens * self.shape.n_kv_heads * (packed_bytes(self.shape.head_dim, self._bits) + 2)

    def basis_bytes(self) -> int:
        return 4 * (self._rotation.numel() + self._levels.numel())
