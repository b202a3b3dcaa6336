"""What all baselines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ...calibration.rope_probe import ModelShape
from ...preset import Side


class Baseline(ABC):
    """A method from a paper or another program; see `kvlathe.lab.evaluation.Method` for what its members mean.

    Args:
        shape: of the model's cache.
    """

    name: str
    family: str
    group_len = 1

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    @property
    def identity(self) -> str:
        return f"baseline {self.name}"

    @property
    def values_a_token(self) -> int:
        """Numbers of one side of one token in one layer."""
        return self.shape.n_kv_heads * self.shape.head_dim

    @abstractmethod
    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        """What is read back of [B, n_kv_heads, T, D]."""

    def coded_end(self, start: int, end: int) -> int:
        return start + max(0, end - start) // self.group_len * self.group_len

    @abstractmethod
    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        """Bytes of ``n_tokens`` tokens of one side of a layer, all KV heads."""

    def basis_bytes(self) -> int:
        return 0


def packed_bytes(n_codes: int, bits: int) -> int:
    """Bytes of codes of ``bits`` bits each, packed without gaps."""
    return -(-n_codes * bits // 8)


def in_float16(x: Tensor) -> Tensor:
    """x as it comes back from being stored in 16 bits; beyond float16's range at its largest number."""
    return x.clamp(-65504.0, 65504.0).half().to(x.dtype)
