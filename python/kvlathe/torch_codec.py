"""The packed format in torch, for devices that the native code does not reach. Same tables, same bytes.

The native scalar encoder defines the format (`docs/block_format.md`). Sums run in another order here, so a coefficient
or a drift that lies on the border of two codes may fall to the other side; everything else is equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._native import StreamSetCodec
from .errors import NonFiniteError

# docs/block_format.md: gains and guards, drift.
_GUARD_SCALES = (0.75, 0.84, 0.92, 1.0, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6.0, 24.0, 256.0, 16384.0)
_GUARD_CANDIDATES = 5
_GAIN_CODES_PER_OCTAVE = 32
_GAIN_CODE_OF_ONE = 2048
_MOST_GAIN_CODE = 4095
_MOST_FALL = 14
_FALL_OF_ZERO = 15
_HEADER_BYTES = 2
_DRIFT_HALF = 8  # levels of drift go from -8 to 7
_DRIFT_STEP = 0.1875  # of a standard deviation
_DRIFT_REACH = 4.0  # standard deviations that a token may add to its block's drift
MAX_MAGNITUDE = 1e17


def can_be_coded(x: Tensor) -> bool:
    """Whether all numbers are finite and at most `MAX_MAGNITUDE` in magnitude."""
    # In float16 the limit itself would be infinity, and infinity within it.
    return bool((x.abs() <= min(MAX_MAGNITUDE, torch.finfo(x.dtype).max)).all())


@dataclass(frozen=True)
class _Head:
    """Tables of one stream, on the device. See the native `StreamTables` for units.

    Coefficients are in the order of storage: those with drift only follow the ``n_coded`` ones that have rows.
    """

    widths: tuple[int, ...]  # [n_coded]
    analysis: Tensor  # [D, D]
    synthesis: Tensor  # [D, D]
    coded_mean: Tensor  # [D, block_len]
    shape_mean: Tensor  # [D, block_len]
    drift_units: Tensor  # [D]
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
        self._drift_at = _HEADER_BYTES + self.block_len
        self._rows_at = self._drift_at + (self.head_dim + 1) // 2
        self._device = device
        self._heads = [self._load(codec, head) for head in range(codec.n_heads)]
        # MPS has no float64: tables are made on the CPU.
        codes = torch.arange(_MOST_GAIN_CODE + 1, dtype=torch.float64)
        gains = torch.exp2((codes - _GAIN_CODE_OF_ONE) / _GAIN_CODES_PER_OCTAVE)
        gains[0] = 0.0
        self._gains = gains.to(torch.float32).to(device)
        self._scales = torch.tensor(_GUARD_SCALES, dtype=torch.float32, device=device)
        # What each spacing reaches below a block's gain.
        self._reaches = _MOST_FALL << torch.arange(16, device=device)
        self._rope = codec.rope

    def _load(self, codec: StreamSetCodec, head: int) -> _Head:
        tables = codec.tables(head)
        widths = tuple(width for width in tables["widths"] if width)
        d, n = codec.head_dim, codec.block_len

        def table(name: str, *shape: int) -> Tensor:
            values = torch.frombuffer(bytearray(tables[name]), dtype=torch.float32)
            return values.view(*shape).to(self._device)

        return _Head(
            widths=widths,
            analysis=table("analysis", d, d),
            synthesis=table("synthesis", d, d),
            coded_mean=table("coded_mean", d, n),
            shape_mean=table("shape_mean", d, n),
            drift_units=table("drift_units", d),
            step_cost=table("step_cost", d)[: len(widths)],
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
        if not can_be_coded(x):
            raise NonFiniteError("vectors hold NaN, infinity or a magnitude above 1e17")
        batch, heads, n_tokens, d = x.shape
        blocks = x.to(torch.float32).view(batch, heads, n_tokens // self.block_len, self.block_len, d)
        blocks = self._turn(blocks, position, -1)
        return torch.cat(
            [self._encode_head(head, blocks[:, h]) for h, head in enumerate(self._heads)], dim=-1
        )

    def _encode_head(self, head: _Head, x: Tensor) -> Tensor:
        n_coded = len(head.widths)
        packed_header, falls, gain = self._choose_gains(x.square().sum(-1) / self.head_dim)
        z = (x @ head.analysis.T) * (1.0 / gain)[..., None] - head.coded_mean.T
        z = torch.where((gain > 0)[..., None], z, torch.zeros_like(z))
        drift = self._choose_drift(head, z)
        z = (z - self._drift(head, drift))[..., :n_coded]
        guard = self._choose_guard(head, z)
        codes = self._quantise(head, z, self._scales[guard]).to(torch.uint8)
        side = (falls | (guard << 4)).to(torch.uint8)
        rows = [_pack_row(width, codes[..., i]) for i, width in enumerate(head.widths)]
        return torch.cat([packed_header, side, _pack_drift(drift), *rows], dim=-1)

    def _choose_gains(self, mean_square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block's header [..., 2], its tokens' falls [..., block_len], and the gains γ̂ that these stand for."""
        # In float32 on the device; a gain code may differ by one from the native one at a border, which is no error.
        log_gain = mean_square.log2() * (_GAIN_CODES_PER_OCTAVE / 2)
        codes = (log_gain.round() + _GAIN_CODE_OF_ONE).clamp(0, _MOST_GAIN_CODE)
        codes = torch.where(mean_square > 0, codes, torch.zeros_like(codes)).to(torch.int64)
        largest = codes.amax(-1, keepdim=True)
        smallest = torch.where(codes > 0, codes, largest).amin(-1, keepdim=True)
        # The least spacing with which the smallest gain can be stated.
        spacing = (self._reaches < largest - smallest).sum(-1, keepdim=True)
        falls = (largest - codes + ((1 << spacing) >> 1)) >> spacing
        falls = torch.where(codes > 0, falls.clamp_max(_MOST_FALL), torch.full_like(codes, _FALL_OF_ZERO))
        stated = largest | (spacing << 12)
        packed = torch.cat([stated & 255, stated >> 8], dim=-1).to(torch.uint8)
        return packed, falls, self._gain(largest, spacing, falls)

    def _gain(self, largest: Tensor, spacing: Tensor, falls: Tensor) -> Tensor:
        codes = (largest - (falls << spacing)).clamp_min(1)
        return self._gains[torch.where(falls == _FALL_OF_ZERO, torch.zeros_like(codes), codes)]

    def _choose_drift(self, head: _Head, z: Tensor) -> Tensor:
        """Codes [..., 1, D] of the drift of z[..., block_len, D]: the mean over the block, outliers clamped."""
        reach = head.drift_units * (_DRIFT_REACH / _DRIFT_STEP)
        total = torch.minimum(torch.maximum(z, -reach), reach).sum(-2, keepdim=True)
        level = torch.floor(total * (1.0 / (head.drift_units * self.block_len)) + 0.5)
        return level.clamp(-_DRIFT_HALF, _DRIFT_HALF - 1).to(torch.int64) + _DRIFT_HALF

    def _drift(self, head: _Head, codes: Tensor) -> Tensor:
        """What drift codes stand for, in steps."""
        return (codes - _DRIFT_HALF) * head.drift_units

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
            n_bytes = self._rows_at + sum(self.block_len * width // 8 for width in head.widths)
            outputs.append(self._decode_head(head, packed[..., at : at + n_bytes]))
            at += n_bytes
        x = self._turn(torch.stack(outputs, dim=1), position, +1)
        x = x.view(batch, len(self._heads), n_blocks * self.block_len, self.head_dim)
        if dtype == torch.float16:
            x = x.clamp(-65504.0, 65504.0)
        return x.to(dtype)

    def _decode_head(self, head: _Head, packed: Tensor) -> Tensor:
        n = self.block_len
        stated, side = (
            packed[..., :_HEADER_BYTES].to(torch.int64),
            packed[..., _HEADER_BYTES : self._drift_at],
        )
        stated, side = stated[..., :1] | (stated[..., 1:] << 8), side.to(torch.int64)
        gain, scale = self._gain(stated & 4095, stated >> 12, side & 15), self._scales[side >> 4]
        drift = _unpack_drift(packed[..., self._drift_at : self._rows_at], self.head_dim)
        z = self._drift(head, drift.to(torch.int64)).expand(*gain.shape, -1)
        at, levels = self._rows_at, []
        for width in head.widths:
            row = packed[..., at : at + n * width // 8]
            levels.append(_unpack_row(width, row).to(torch.float32) + (0.5 - 2.0 ** (width - 1)))
            at += n * width // 8
        if levels:
            n_coded = len(levels)
            coded = torch.stack(levels, dim=-1) * scale[..., None] + z[..., :n_coded]
            z = torch.cat([coded, z[..., n_coded:]], dim=-1)
        return (z @ head.synthesis.T + head.shape_mean.T) * gain[..., None]


def _pack_drift(codes: Tensor) -> Tensor:
    """Codes [..., 1, D], below 16, to [..., ⌈D/2⌉ bytes]: byte j holds those of the coefficients j and j + ⌈D/2⌉."""
    n = (codes.shape[-1] + 1) // 2
    codes = nn.functional.pad(codes[..., 0, :], (0, 2 * n - codes.shape[-1]))
    return (codes[..., :n] | (codes[..., n:] << 4)).to(torch.uint8)


def _unpack_drift(packed: Tensor, head_dim: int) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., None, :head_dim]


def _pack_row(width: int, codes: Tensor) -> Tensor:
    """Codes [..., n] of one coefficient to its row [..., n·width/8]."""
    if width == 3:
        return torch.cat([_pack_runs(2, codes & 3), _pack_runs(1, codes >> 2)], dim=-1)
    return _pack_runs(width, codes)


def _unpack_row(width: int, row: Tensor) -> Tensor:
    if width == 3:
        n_low = row.shape[-1] // 3 * 2
        return _unpack_runs(2, row[..., :n_low]) | (_unpack_runs(1, row[..., n_low:]) << 2)
    return _unpack_runs(width, row)


def _pack_runs(bits: int, codes: Tensor) -> Tensor:
    """Codes [..., n] of so many bits to [..., n·bits/8]: runs of tokens side by side in a byte."""
    runs = codes.unflatten(-1, (8 // bits, -1))
    row = runs[..., 0, :]
    for k in range(1, 8 // bits):
        row = row | (runs[..., k, :] << (bits * k))
    return row


def _unpack_runs(bits: int, row: Tensor) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(row >> (bits * k)) & mask for k in range(8 // bits)], dim=-1)
