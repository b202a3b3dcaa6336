"""The packed format in torch, for devices that the native code does not reach. Same tables, same bytes.

The native scalar encoder defines the format (`docs/block_format.md`). Sums run in another order here, so a coefficient
or a drift that lies on the border of two codes may fall to the other side; everything else is equal.
"""

from __future__ import annotations

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


class TorchStreamCodec:
    """Encodes and decodes packed blocks with torch operations on one device, all heads at once.

    Coefficients are in the order of storage: those with drift only follow those that have planes.

    Args:
        codec: the native codec whose tables are copied.
        device: where tensors live.
    """

    def __init__(self, codec: StreamSetCodec, device: torch.device) -> None:
        self.block_len, self.head_dim = codec.block_len, codec.head_dim
        self.block_bytes = codec.block_bytes
        heads = [codec.tables(head) for head in range(codec.n_heads)]

        def table(name: str, *shape: int) -> Tensor:
            """[n_heads, *shape] of the native tables `name`; see `StreamTables` for their units."""
            values = [torch.frombuffer(bytearray(tables[name]), dtype=torch.float32) for tables in heads]
            return torch.stack(values).view(len(heads), *shape).to(device)

        d, n = self.head_dim, self.block_len
        # Of all heads, laid out to multiply and be added to [..., n_heads, block_len, D].
        self._analysis = table("analysis", d, d).transpose(1, 2).contiguous()
        self._synthesis = table("synthesis", d, d).transpose(1, 2).contiguous()
        self._coded_mean = table("coded_mean", d, n).transpose(1, 2).contiguous()
        self._shape_mean = table("shape_mean", d, n).transpose(1, 2).contiguous()
        self._drift_units = table("drift_units", 1, d)
        widths = torch.tensor([list(tables["widths"]) for tables in heads])
        coded = widths > 0
        half = torch.where(coded, 2.0 ** (widths - 1), torch.zeros(()))[:, None]
        # Half the number of levels, and what makes one of |z|; 0 where there is no plane, which makes all codes 0.
        self._half = half.to(device)
        self._per_half = torch.where(half > 0, 1.0 / half, half).to(device)
        self._most_level = (half - 1.0).clamp_min(0.0).to(device)
        # The middle of a code's interval, less the code.
        self._to_level = torch.where(coded, 0.5, 0.0)[:, None].to(device) - self._half
        self._step_cost = table("step_cost", 1, d) * (self._half > 0)
        self._layout = _Layout(widths, self.block_len, device)
        assert self._layout.block_bytes == self.block_bytes
        # MPS has no float64: what needs it is made on the CPU.
        self._rope = codec.rope
        if self._rope is not None:
            exact = torch.device("cpu") if device.type == "mps" else device
            self._inv_freq = torch.tensor(self._rope[2], dtype=torch.float64, device=exact)
        codes = torch.arange(_MOST_GAIN_CODE + 1, dtype=torch.float64)
        gains = torch.exp2((codes - _GAIN_CODE_OF_ONE) / _GAIN_CODES_PER_OCTAVE)
        gains[0] = 0.0
        self._gains = gains.to(torch.float32).to(device)
        self._scales = torch.tensor(_GUARD_SCALES, dtype=torch.float32, device=device)
        # What each spacing reaches below a block's gain.
        self._reaches = _MOST_FALL << torch.arange(16, device=device)

    def _turn(self, x: Tensor, position: int, direction: int) -> Tensor:
        """Rotate blocks x[..., n_blocks, n_heads, block_len, D] by R(±c), c their centres."""
        if self._rope is None:
            return x
        pairing, rotary_dim, _ = self._rope
        blocks = torch.arange(x.shape[-4], dtype=torch.float64, device=self._inv_freq.device)
        centres = position + self.block_len // 2 + self.block_len * blocks
        angles = direction * centres[:, None] * self._inv_freq
        cos, sin = (t.to(torch.float32).to(x.device)[:, None, None, :] for t in (angles.cos(), angles.sin()))
        rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if pairing == "half_split":
            a, b = rotated.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1)

    def encode(self, x: Tensor, position: int) -> Tensor:
        """[B, H, n_tokens, D] to uint8 [B, n_blocks, block bytes]. See `StreamSetCompressor.compress`."""
        if not can_be_coded(x):
            raise NonFiniteError("vectors hold NaN, infinity or a magnitude above 1e17")
        blocks = x.to(torch.float32).unflatten(2, (-1, self.block_len)).transpose(1, 2)
        blocks = self._turn(blocks, position, -1)
        header, falls, gain = self._choose_gains(blocks.square().sum(-1) / self.head_dim)
        z = (blocks @ self._analysis) * (1.0 / gain)[..., None] - self._coded_mean
        z = torch.where((gain > 0)[..., None], z, torch.zeros_like(z))
        drift = self._choose_drift(z, gain)
        z = z - self._drift(drift)
        guard = self._choose_guard(z)
        codes = self._quantise(z, self._scales[guard]).to(torch.uint8)
        side = (falls | (guard << 4)).to(torch.uint8)
        return self._layout.pack(
            torch.cat([header, side, _pack_drift(drift)], dim=-1), codes.transpose(-1, -2)
        )

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

    def _choose_drift(self, z: Tensor, gain: Tensor) -> Tensor:
        """Codes [..., 1, D] of the drift of z[..., block_len, D]: the mean over tokens that are not zero, outliers
        clamped.
        """
        n_tokens = (gain > 0).sum(-1).clamp_min(1)[..., None, None]
        reach = self._drift_units * (_DRIFT_REACH / _DRIFT_STEP)
        total = torch.minimum(torch.maximum(z, -reach), reach).sum(-2, keepdim=True)
        level = torch.floor(total * (1.0 / (self._drift_units * n_tokens)) + 0.5)
        return level.clamp(-_DRIFT_HALF, _DRIFT_HALF - 1).to(torch.int64) + _DRIFT_HALF

    def _drift(self, codes: Tensor) -> Tensor:
        """What drift codes [..., 1, D] stand for, in steps."""
        return (codes - _DRIFT_HALF) * self._drift_units

    def _quantise(self, z: Tensor, scale: Tensor) -> Tensor:
        levels = torch.floor(z * (1.0 / scale)[..., None])
        return torch.minimum(torch.maximum(levels, -self._half), self._most_level) + self._half

    def _choose_guard(self, z: Tensor) -> Tensor:
        """The guard code of least weighted error among the smallest that clips nothing and those just below."""
        ratio = (z.abs() * self._per_half).amax(-1)
        safe = torch.searchsorted(self._scales, ratio.contiguous()).clamp_max(len(_GUARD_SCALES) - 1)
        best, best_cost = safe, torch.full_like(ratio, torch.inf)
        for below in range(_GUARD_CANDIDATES):
            guard = (safe - below).clamp_min(0)
            scale = self._scales[guard]
            levels = self._quantise(z, scale) + self._to_level
            cost = ((z - levels * scale[..., None]).square() * self._step_cost).sum(-1)
            better = cost < best_cost
            best, best_cost = torch.where(better, guard, best), torch.where(better, cost, best_cost)
        return best

    def decode(self, packed: Tensor, position: int, dtype: torch.dtype) -> Tensor:
        """uint8 [B, n_blocks, block bytes] to [B, H, n_tokens, D]. See `StreamSetCompressor.expand`."""
        sides, codes = self._layout.unpack(packed)
        stated, side, drift = sides.split([_HEADER_BYTES, self.block_len, (self.head_dim + 1) // 2], dim=-1)
        stated, side = stated.to(torch.int64), side.to(torch.int64)
        stated = stated[..., :1] | (stated[..., 1:] << 8)
        gain, scale = self._gain(stated & 4095, stated >> 12, side & 15), self._scales[side >> 4]
        z = codes.transpose(-1, -2) + self._to_level
        z = z * scale[..., None] + self._drift(_unpack_drift(drift, self.head_dim).to(torch.int64))
        x = self._turn((z @ self._synthesis + self._shape_mean) * gain[..., None], position, +1)
        if dtype == torch.float16:
            x = x.clamp(-65504.0, 65504.0)
        return x.to(dtype).transpose(1, 2).flatten(2, 3)


class _Layout:
    """Where the parts of all heads lie in a block: sides first (header, side information, drift), then planes.

    Planes of one width are packed and unpacked together, whatever their heads.

    Args:
        widths: [n_heads, D], in the order of storage.
    """

    def __init__(self, widths: Tensor, block_len: int, device: torch.device) -> None:
        n_heads, d = widths.shape
        self._shape = (n_heads, d, block_len)
        side_bytes = _HEADER_BYTES + block_len + (d + 1) // 2
        plane_bytes = widths * block_len // 8
        head_bytes = side_bytes + plane_bytes.sum(1)
        head_at = head_bytes.cumsum(0) - head_bytes
        plane_at = head_at[:, None] + side_bytes + plane_bytes.cumsum(1) - plane_bytes
        self.block_bytes = int(head_bytes.sum())
        # Bytes of the block in the order in which they are packed and unpacked: sides, then planes by width.
        parts = [(head_at[:, None] + torch.arange(side_bytes)).flatten()]
        self._side_bytes = side_bytes
        self._groups: list[tuple[int, int]] = []  # (width, number of planes)
        planes = []  # which of the n_heads·D coefficients
        for width in sorted(set(widths.flatten().tolist())):
            of_width = (widths.flatten() == width).nonzero()[:, 0]
            planes.append(of_width)
            self._groups.append((width, len(of_width)))
            starts = plane_at.flatten()[of_width]
            parts.append((starts[:, None] + torch.arange(width * block_len // 8)).flatten())
        order, coefficients = torch.cat(parts), torch.cat(planes)
        self._bytes, self._bytes_back = order.to(device), order.argsort().to(device)
        self._planes, self._planes_back = coefficients.to(device), coefficients.argsort().to(device)

    def pack(self, sides: Tensor, codes: Tensor) -> Tensor:
        """Sides [..., n_heads, side bytes] and codes [..., n_heads, D, block_len], uint8, to [..., block bytes]."""
        parts = [sides.flatten(-2)]
        by_width = (
            codes.flatten(-3, -2).index_select(-2, self._planes).split([n for _, n in self._groups], dim=-2)
        )
        for (width, _), group in zip(self._groups, by_width, strict=True):
            if width:
                parts.append(_pack_planes(width, group).flatten(-2))
        return torch.cat(parts, dim=-1).index_select(-1, self._bytes_back)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: sides and codes."""
        n_heads, d, block_len = self._shape
        sizes = [n_heads * self._side_bytes, *(n * width * block_len // 8 for width, n in self._groups)]
        sides, *planes = packed.index_select(-1, self._bytes).split(sizes, dim=-1)
        codes = [
            _unpack_planes(width, group.unflatten(-1, (n, -1)))
            if width
            else packed.new_zeros(*packed.shape[:-1], n, block_len)
            for (width, n), group in zip(self._groups, planes, strict=True)
        ]
        together = torch.cat(codes, dim=-2).index_select(-2, self._planes_back)
        return sides.unflatten(-1, (n_heads, -1)), together.unflatten(-2, (n_heads, d))


def _pack_drift(codes: Tensor) -> Tensor:
    """Codes [..., 1, D], below 16, to [..., ⌈D/2⌉ bytes]: byte j holds those of the coefficients j and j + ⌈D/2⌉."""
    n = (codes.shape[-1] + 1) // 2
    codes = nn.functional.pad(codes[..., 0, :], (0, 2 * n - codes.shape[-1]))
    return (codes[..., :n] | (codes[..., n:] << 4)).to(torch.uint8)


def _unpack_drift(packed: Tensor, head_dim: int) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., None, :head_dim]


def _pack_planes(width: int, codes: Tensor) -> Tensor:
    """Codes [..., n] of coefficients to their planes [..., n·width/8]."""
    if width == 3:
        return torch.cat([_pack_runs(2, codes & 3), _pack_runs(1, codes >> 2)], dim=-1)
    return _pack_runs(width, codes)


def _unpack_planes(width: int, planes: Tensor) -> Tensor:
    if width == 3:
        n_low = planes.shape[-1] // 3 * 2
        return _unpack_runs(2, planes[..., :n_low]) | (_unpack_runs(1, planes[..., n_low:]) << 2)
    return _unpack_runs(width, planes)


def _pack_runs(bits: int, codes: Tensor) -> Tensor:
    """Codes [..., n] of so many bits to [..., n·bits/8]: runs of tokens side by side in a byte."""
    runs = codes.unflatten(-1, (8 // bits, -1))
    planes = runs[..., 0, :]
    for k in range(1, 8 // bits):
        planes = planes | (runs[..., k, :] << (bits * k))
    return planes


def _unpack_runs(bits: int, planes: Tensor) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(planes >> (bits * k)) & mask for k in range(8 // bits)], dim=-1)
