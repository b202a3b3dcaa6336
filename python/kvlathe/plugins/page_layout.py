"""Where the numbers of a page lie in a server's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..errors import ModelError


@dataclass(frozen=True)
class PageLayout:
    """A page: ``n_blocks`` of the server's blocks, of all layers and workers, one behind the other.

    Attributes:
        axes: of one worker's numbers as they lie in memory, slowest first: layers L, blocks B, KV heads H, tokens N,
            and a token's key with its value behind it, C.
        n_layers, n_workers, n_heads, n_blocks, block_tokens, head_dim: sizes; heads are one worker's.
        dtype: of the numbers.
        slots: where a kernel puts a head's keys and values within its block, [2, block_tokens, head_dim] flat; None if
            they lie as ``axes`` say.

    Raises:
        ModelError: axes that do not keep a block together.
    """

    axes: str
    n_layers: int
    n_workers: int
    n_heads: int
    n_blocks: int
    block_tokens: int
    head_dim: int
    dtype: torch.dtype
    slots: Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if sorted(self.axes) != sorted("LBHNC") or self.axes.index("B") > self.axes.index("H"):
            raise ModelError(
                f"a cache in the layout {self.axes} does not keep the heads of a block together; let the server use "
                f"another one, such as LBHNC"
            )
        if self.slots is not None and not self.axes.endswith("HNC"):
            raise ModelError(
                f"a kernel that orders blocks by itself in the layout {self.axes}, expected one that ends with HNC"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens of a page."""
        return self.n_blocks * self.block_tokens

    @property
    def n_bytes(self) -> int:
        """Bytes of a page, without what the server fills it up with."""
        return math.prod(self.sizes) * 2 * self.dtype.itemsize

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Layers, workers, a worker's heads, blocks, their tokens, head_dim."""
        return (
            self.n_layers,
            self.n_workers,
            self.n_heads,
            self.n_blocks,
            self.block_tokens,
            self.head_dim,
        )

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """From layer to layer, worker to worker, head to head, block to block, in numbers."""
        return self._stride("L"), self._stride("W"), self._stride("H"), self._stride("B")

    @property
    def places(self) -> list[int]:
        """Of a head's keys and values within its block: [2, block_tokens, head_dim] flat, in numbers."""
        if self.slots is not None:
            return list(self.slots)
        from_token, dim = self._stride("N"), self.head_dim
        return [
            token * from_token + side * dim + component
            for side in range(2)
            for token in range(self.block_tokens)
            for component in range(dim)
        ]

    def _stride(self, axis: str) -> int:
        sizes = {
            "L": self.n_layers,
            "H": self.n_heads,
            "B": self.n_blocks,
            "N": self.block_tokens,
            "C": 2 * self.head_dim,
        }
        lying = "W" + self.axes
        return math.prod(sizes[faster] for faster in lying[lying.index(axis) + 1 :])
