"""The packed format in torch, for devices that the native code does not reach. Same tables, same bytes.

The native scalar encoder defines the format (`docs/block_format.md`). Sums run in another order here, so a
coefficient that lies on the border of two codes may fall to the other side; everything else is equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._native import StreamSetCodec
from .errors import NonFiniteError

# docs/block_format.md, "Side information".
_GUARD_SCALES = (0.75, 0.84, 0.92, 1.0, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6.0, 24.0, 256.0, 16384.0)
_GUARD_CANDIDATES = 5
_GAIN_CODES_PER_OCTAVE = 32
_GAIN_CODE_OF_ONE = 2048
MAX_MAGNITUDE = 1e17


@dataclass(frozen=True)
class _Head:
    """Tables of one stream, on the device. See the native `StreamTables` for shapes and units."""

    widths: tuple[int, ...]
    analysis: Tensor  # [n_coded, D]
    synthesis: Tensor  # [D, n_coded]
    coded_mean: Tensor  # [n_coded, block_len]
    shape_mean: Tensor  # [D, block_len]
    step_cost: Tensor  # [n_coded]
    half: Tensor  # [n_coded], half the number of levels


class TorchStreamCodec:
    """Encodes and decodes packed blocks with torch operations on one device.

    Args:
        codec: the native codec whose tables are copied.
        device: where tensors live.
    """

    def __init__(self, codec: StreamSetCodec, device: torch.device) -> None:
        self.block_len, self.head_dim = codec.block_len, codec.head_dim
        self.block_bytes = codec.block_bytes
        self._device = device
        self._heads = [self._load(codec, head) for head in range(codec.n_heads)]
        # MPS has no float64: tables are made on the CPU.
        codes = torch.arange(4096, dtype=torch.float64)
        gains = torch.exp2((codes - _GAIN_CODE_OF_ONE) / _GAIN_CODES_PER_OCTAVE)
        gains[0] = 0.0
        self._gains = gains.to(torch.float32).to(device)
        self._scales = torch.tensor(_GUARD_SCALES, dtype=torch.float32, device=device)
        self._rope = codec.rope

    def _load(self, codec: StreamSetCodec, head: int) -> _Head:
        tables = codec.tables(head)
        widths = tuple(tables["widths"])
        n_coded, d, n = len(widths), codec.head_dim, codec.block_len

        def table(name: str, *shape: int) -> Tensor:
            if not all(shape):
                return torch.zeros(shape, device=self._device)
            values = torch.frombuffer(bytearray(tables[name]), dtype=torch.float32)
            return values.view(*shape).to(self._device)

        return _Head(
            widths=widths,
            analysis=table("analysis", n_coded, d),
            synthesis=table("synthesis", d, n_coded),
            coded_mean=table("coded_mean", n_coded, n),
            shape_mean=table("shape_mean", d, n),
            step_cost=table("step_cost", n_coded),
            half=torch.tensor([2.0 ** (w - 1) for w in widths], device=self._device),
        )

    def _turn(self, x: Tensor, position: int, direction: int) -> Tensor:
        """Rotate blocks x[..., n_blocks, block_len, D] by R(±c), c their centres."""
        if self._rope is None:
            return x
        pairing, rotary_dim, inv_freq = self._rope
        n_blocks = x.shape[-3]
        centres = (
            position + self.block_len // 2 + self.block_len * torch.arange(n_blocks, dtype=torch.float64)
        )
        angles = direction * centres[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
        cos, sin = (t.to(torch.float32).to(x.device)[:, None, :] for t in (angles.cos(), angles.sin()))
        x = x.clone()
        rotated = x[..., :rotary_dim]
        if pairing == "half_split":
            a, b = rotated[..., : rotary_dim // 2].clone(), rotated[..., rotary_dim // 2 :].clone()
            rotated[..., : rotary_dim // 2] = a * cos - b * sin
            rotated[..., rotary_dim // 2 :] = b * cos + a * sin
        else:
            a, b = rotated[..., 0::2].clone(), rotated[..., 1::2].clone()
            rotated[..., 0::2] = a * cos - b * sin
            rotated[..., 1::2] = b * cos + a * sin
        return x

    def encode(self, x: Tensor, position: int) -> Tensor:
        """[B, H, n_tokens, D] to uint8 [B, n_blocks, block bytes]. See `StreamSetCompressor.compress`."""
        if not bool((x.abs() <= MAX_MAGNITUDE).all()):
            raise NonFiniteError("vectors hold NaN, infinity or a magnitude above 1e17")
        batch, heads, n_tokens, d = x.shape
        blocks = x.to(torch.float32).view(batch, heads, n_tokens // self.block_len, self.block_len, d)
        blocks = self._turn(blocks, position, -1)
        return torch.cat(
            [self._encode_head(head, blocks[:, h]) for h, head in enumerate(self._heads)], dim=-1
        )

    def _encode_head(self, head: _Head, x: Tensor) -> Tensor:
        mean_square = x.square().sum(-1) / self.head_dim
        # In float32 on the device; a gain code may differ by one from the native one at a border, which is no error.
        log_gain = mean_square.log2() * (_GAIN_CODES_PER_OCTAVE / 2)
        gain_codes = (log_gain.round() + _GAIN_CODE_OF_ONE).clamp(0, 4095)
        gain_codes = torch.where(mean_square > 0, gain_codes, torch.zeros_like(gain_codes)).to(torch.int64)
        gain = self._gains[gain_codes]
        inverse_gain = torch.where(gain > 0, 1.0 / gain, torch.zeros_like(gain))
        z = (x @ head.analysis.T) * inverse_gain[..., None] - head.coded_mean.T
        guard = self._choose_guard(head, z)
        codes = self._quantise(head, z, self._scales[guard]).to(torch.uint8)
        side = gain_codes | (guard << 12)
        side_bytes = torch.stack([side & 255, side >> 8], dim=-1).to(torch.uint8).flatten(-2)
        rows = [_pack_row(width, codes[..., i]) for i, width in enumerate(head.widths)]
        return torch.cat([side_bytes, *rows], dim=-1)

    def _quantise(self, head: _Head, z: Tensor, scale: Tensor) -> Tensor:
        levels = torch.floor(z * (1.0 / scale)[..., None])
        return torch.minimum(torch.maximum(levels, -head.half), head.half - 1.0) + head.half

    def _choose_guard(self, head: _Head, z: Tensor) -> Tensor:
        """The guard code of least weighted error among the smallest that clips nothing and those just below."""
        if not head.widths:
            return torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
        ratio = (z.abs() * (1.0 / head.half)).amax(-1)
        safe = torch.searchsorted(self._scales, ratio.contiguous()).clamp_max(len(_GUARD_SCALES) - 1)
        best, best_cost = safe, torch.full_like(ratio, torch.inf)
        for below in range(_GUARD_CANDIDATES):
            guard = (safe - below).clamp_min(0)
            scale = self._scales[guard]
            levels = self._quantise(head, z, scale) + (0.5 - head.half)
            cost = ((z - levels * scale[..., None]).square() * head.step_cost).sum(-1)
            better = cost < best_cost
            best, best_cost = torch.where(better, guard, best), torch.where(better, cost, best_cost)
        return best

    def decode(self, packed: Tensor, position: int, dtype: torch.dtype) -> Tensor:
        """uint8 [B, n_blocks, block bytes] to [B, H, n_tokens, D]. See `StreamSetCompressor.expand`."""
        batch, n_blocks, _ = packed.shape
        outputs, at = [], 0
        for head in self._heads:
            n_bytes = 2 * self.block_len + sum(self.block_len * width // 8 for width in head.widths)
            outputs.append(self._decode_head(head, packed[..., at : at + n_bytes]))
            at += n_bytes
        x = self._turn(torch.stack(outputs, dim=1), position, +1)
        x = x.view(batch, len(self._heads), n_blocks * self.block_len, self.head_dim)
        if dtype == torch.float16:
            x = x.clamp(-65504.0, 65504.0)
        return x.to(dtype)

    def _decode_head(self, head: _Head, packed: Tensor) -> Tensor:
        n = self.block_len
        side = packed[..., : 2 * n].to(torch.int64).unflatten(-1, (n, 2))
        side = side[..., 0] | (side[..., 1] << 8)
        gain, scale = self._gains[side & 4095], self._scales[side >> 12]
        at, levels = 2 * n, []
        for width in head.widths:
            row = packed[..., at : at + n * width // 8]
            levels.append(_unpack_row(width, row).to(torch.float32) + (0.5 - 2.0 ** (width - 1)))
            at += n * width // 8
        if not levels:
            return head.shape_mean.T * gain[..., None]
        shape = (torch.stack(levels, dim=-1) @ head.synthesis.T) * scale[..., None] + head.shape_mean.T
        return shape * gain[..., None]


def _pack_row(width: int, codes: Tensor) -> Tensor:
    """Codes [..., n] of one coefficient to its row [..., n·width/8]: runs of tokens side by side in a byte."""
    runs = codes.unflatten(-1, (8 // width, -1))
    row = runs[..., 0, :]
    for k in range(1, 8 // width):
        row = row | (runs[..., k, :] << (width * k))
    return row


def _unpack_row(width: int, row: Tensor) -> Tensor:
    mask = (1 << width) - 1
    return torch.cat([(row >> (width * k)) & mask for k in range(8 // width)], dim=-1)
