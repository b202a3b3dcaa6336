"""Where the numbers of a chunk lie in vLLM's memory, and how they become a page of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError

# Sides, layers, workers and their heads, blocks and their tokens, components: a page's order.
_OURS = "SLWHBND"


@dataclass(frozen=True)
class PageLayout:
    """One chunk of vLLM's: ``n_blocks`` blocks of all layers and workers, one behind the other.

    Attributes:
        axes: of one worker's numbers as they lie in memory, slowest first, as in `vllm.v1.kv_cache_layout`: layers L,
            blocks B, KV heads H, tokens N, a token's key and its value C.
        n_workers, n_layers, n_blocks, n_heads, block_tokens, head_dim: sizes; heads are one worker's.
        dtype: of the numbers.
        slots: [2, block_tokens, head_dim] int64, where a kernel puts a head's keys and values within its block; None
            if they lie as ``axes`` say.
    """

    axes: str
    n_workers: int
    n_layers: int
    n_blocks: int
    n_heads: int
    block_tokens: int
    head_dim: int
    dtype: torch.dtype
    slots: Tensor | None = None

    def __post_init__(self) -> None:
        if sorted(self.axes) != sorted("LBHNC") or self.axes.index("B") > self.axes.index("H"):
            raise ModelError(
                f"vLLM's cache layout {self.axes} does not keep a block's heads together; choose another one, such as "
                f"LBHNC (VLLM_KV_CACHE_LAYOUT)"
            )
        if self.slots is not None and not self.axes.endswith("HNC"):
            raise ModelError(f"vLLM's cache layout {self.axes} on a CPU, expected one that ends with HNC")

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.n_blocks * self.block_tokens

    @property
    def n_bytes(self) -> int:
        """Bytes of a chunk, without what fills it up."""
        return math.prod(self._sizes().values()) * self.dtype.itemsize

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """Of a page: [2, layers, all KV heads, tokens, head_dim]."""
        return 2, self.n_layers, self.n_workers * self.n_heads, self.page_tokens, self.head_dim

    def gather(self, chunk: Tensor) -> Tensor:
        """A page, copied from a chunk's bytes (uint8)."""
        held = self._view(chunk)
        if self.slots is not None:
            held = held.index_select(-1, self.slots.flatten()).unflatten(-1, self.slots.shape)
        lying = self._lying()
        page = held.permute([lying.index(axis) for axis in _OURS])
        return page.contiguous().view(self.page_shape)

    def scatter(self, page: Tensor, chunk: Tensor) -> None:
        """Copy a page to a chunk's bytes (uint8)."""
        sizes, lying = self._sizes(), self._lying()
        numbers = page.view([sizes[axis] for axis in _OURS]).permute([_OURS.index(axis) for axis in lying])
        held = self._view(chunk)
        if self.slots is None:
            held.copy_(numbers)
        else:
            # Chosen one by one, which is much faster than putting them one by one.
            held.copy_(numbers.flatten(-3).index_select(-1, self.slots.flatten().argsort()))

    def _sizes(self) -> dict[str, int]:
        return {
            "S": 2,
            "L": self.n_layers,
            "W": self.n_workers,
            "H": self.n_heads,
            "B": self.n_blocks,
            "N": self.block_tokens,
            "D": self.head_dim,
        }

    def _lying(self) -> str:
        """All axes in the order of memory, once slots are seen to."""
        if self.slots is not None:
            return "W" + self.axes.replace("NC", "SND")
        return "W" + self.axes.replace("C", "SD")

    def _view(self, chunk: Tensor) -> Tensor:
        """The chunk's numbers, by the axes of memory; with slots, those of a head's block as one axis."""
        sizes = self._sizes()
        held = chunk[: self.n_bytes].view(self.dtype).view([sizes[axis] for axis in self._lying()])
        return held if self.slots is None else held.flatten(-3)

    def describe(self) -> dict[str, Any]:
        """For messages."""
        return {"axes": self.axes, **self._sizes(), "dtype": str(self.dtype)}
