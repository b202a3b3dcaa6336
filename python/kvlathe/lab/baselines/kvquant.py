"""In the manner of KVQuant (Hooper et al., 2024, arXiv 2401.18079): keys per channel before RoPE, values per token.

What is taken from the paper:

* keys are coded before RoPE, each channel of each head scaled to [-1, 1] by its range on calibration text;
* values are coded per token and head, scaled to [-1, 1] by their own range, kept as two float16 numbers;
* non-uniform levels (nuq): one codebook of 2^b levels for the keys and one for the values of each layer, by k-means on
  scaled calibration data. The paper weighs the points by their Fisher information; here they weigh alike.

What is left out: outliers stored apart as sparse numbers (the paper's "1 %" variants), and with them most of its
quality at 2 and 3 bits. A key beyond its channel's calibrated range clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...calibration.rope_probe import ProbeResult
from ...preset import Side
from .baseline import Baseline, in_float16, packed_bytes
from .lloyd_max import lloyd_max, nearest
from .sample import LayerSample, turned


def to_unit(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x from [low, high] to [-1, 1]; 0 where there is no range."""
    span = high - low
    return torch.where(span > 0, 2 * (x - low) / span.clamp_min(1e-30) - 1, torch.zeros_like(x))


def from_unit(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The inverse of `to_unit`."""
    return low + (u + 1) / 2 * (high - low)


def _levels(scaled: Tensor, bits: int) -> Tensor:
    points = scaled.flatten().sort().values
    return lloyd_max(points, torch.ones_like(points), 2**bits, n_rounds=300)


class KvQuant(Baseline):
    """KVQuant without its outliers, at b bits.

    Args:
        sample: gives calibration text's keys and values, one entry a layer; asked when the first token is coded.
        text_digest: of that text.
    """

    family = "KVQuant, no outliers"

    def __init__(
        self, probe: ProbeResult, bits: int, sample: Callable[[], Sequence[LayerSample]], text_digest: str
    ) -> None:
        super().__init__(probe.shape)
        self.name = f"kvquant-{bits}"
        self._bits = bits
        self._text_digest = text_digest
        self._ropes = probe.ropes
        self._sample = sample

    @cached_property
    def _ranges(self) -> list[tuple[Tensor, Tensor]]:
        """Least and largest value of each key channel, [H, 1, D], by layer."""
        return [
            (in_float16(layer.key_low)[:, None], in_float16(layer.key_high)[:, None])
            for layer in self._sample()
        ]

    @cached_property
    def _codebooks(self) -> list[dict[Side, Tensor]]:
        """Levels [2^bits] by layer."""
        found: list[dict[Side, Tensor]] = []
        for layer, (low, high) in zip(self._sample(), self._ranges, strict=True):
            keys, values = torch.cat(layer.keys, 1), torch.cat(layer.values, 1)
            scaled_values = to_unit(values, values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))
            found.append(
                {
                    "key": _levels(to_unit(keys, low, high), self._bits),
                    "value": _levels(scaled_values, self._bits),
                }
            )
        return found

    @property
    def identity(self) -> str:
        return f"baseline {self.name} calibrated on {self._text_digest}"

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        codebook = self._codebooks[layer][side]
        if side == "value":
            low, high = in_float16(x.amin(-1, keepdim=True)), in_float16(x.amax(-1, keepdim=True))
            return from_unit(nearest(to_unit(x, low, high), codebook), low, high)
        low, high = (bound.to(x) for bound in self._ranges[layer])
        still = turned(x, self._ropes[layer], position, -1)
        coded = from_unit(nearest(to_unit(still, low, high), codebook), low, high)
        return turned(coded, self._ropes[layer], position, 1)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        codes = packed_bytes(self.shape.head_dim, self._bits)
        return n_tokens * self.shape.n_kv_heads * (codes + (4 if side == "value" else 0))

    def basis_bytes(self) -> int:
        a_layer = 2 * 2 * self.values_a_token + 2 * 2 * 2**self._bits
        return self.shape.n_layers * a_layer
