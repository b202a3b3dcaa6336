"""The seed's method: PCA that the heads of a layer share, truncated to a rank, components in int8.

The product's own class for presets of that kind does the coding. The seed's published configuration codes values only;
with keys and values both it is the same method on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...calibration.rope_probe import ModelShape
from ...compressors import QuantizedCalibratedCompressor
from ...preset import Side
from .baseline import Baseline
from .sample import LayerSample


def principal_directions(count: int, total: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` eigenvectors [D, rank] of the covariance, largest first, and the mean [D]; float32."""
    mean = total / count
    _, vectors = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    return vectors.flip(1)[:, :rank].float(), mean.float()


class RankInt8(Baseline):
    """Rank and int8.

    Args:
        sides: which sides are coded; the other stays exact.
        sample: gives calibration text's moments, one entry a layer; asked when the first token is coded.
        text_digest: of that text.
        rank_fraction: of head_dim; three quarters is what the seed's documentation recommends.
    """

    def __init__(
        self,
        shape: ModelShape,
        sides: Sequence[Side],
        sample: Callable[[], Sequence[LayerSample]],
        text_digest: str,
        rank_fraction: float = 0.75,
    ) -> None:
        super().__init__(shape)
        letters = "".join("k" if side == "key" else "v" for side in sides)
        self.name = f"rank-int8-{letters}"
        self.family = f"rank + int8, {' and '.join(letters.upper())}"
        self._rank = max(1, int(shape.head_dim * rank_fraction))
        self._text_digest = text_digest
        self._sides = tuple(sides)
        self._sample = sample

    @cached_property
    def _compressors(self) -> dict[tuple[int, Side], QuantizedCalibratedCompressor]:
        return {
            (at, side): QuantizedCalibratedCompressor(
                *principal_directions(layer.count, layer.total[side], layer.gram[side], self._rank)
            )
            for at, layer in enumerate(self._sample())
            for side in self._sides
        }

    @property
    def identity(self) -> str:
        return f"baseline {self.name} of rank {self._rank} calibrated on {self._text_digest}"

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        compressor = self._compressors.get((layer, side))
        return x if compressor is None else compressor.expand(compressor.compress(x), x.dtype)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        if side not in self._sides:
            return 2 * n_tokens * self.values_a_token
        return n_tokens * self.shape.n_kv_heads * (self._rank + 4)

    def basis_bytes(self) -> int:
        return self.shape.n_layers * len(self._sides) * 4 * self.shape.head_dim * (self._rank + 1)
