"""Compressors: what turns a run of keys or values into its stored form and back.

Anything with ``compress(x)`` and ``expand(coded)`` serves, `x` being ``[batch, n_kv_heads, n_tokens, head_dim]``
as the model hands it to the cache (keys rotated). Those here also state how their stored form lies in memory, so
that the cache can join runs, and hand the native code over to it on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._native import LowRankCodec, StreamSetCodec
from .counts import is_count
from .errors import DeviceError, DtypeError, NonFiniteError, PicklingError, PresetError, ShapeError
from .saved import by_maker, maker
from .torch_codec import TorchStreamCodec

# Largest entry of |UᵀU - I| that passes for orthonormal; U may have been stored in float16.
_ORTHONORMAL_LIMIT = 1e-3
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@maker("identity")
class IdentityCompressor(nn.Module):
    """Keeps everything bit for bit. Used for keys when only values are compressed."""

    def compress(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x

    def expand(self, coded: Tensor) -> Tensor:
        """Return ``coded`` itself."""
        return coded

    def forward(self, x: Tensor) -> Tensor:
        return x

    def __reduce_ex__(self, protocol: Any) -> Any:
        return by_maker("identity") if type(self) is IdentityCompressor else super().__reduce_ex__(protocol)


@maker("low rank")
class QuantizedCalibratedCompressor(nn.Module):
    """Projection on ``rank`` directions that the heads of a layer share, stored in 8 or 16 bits a component.

    y = Uᵀ(x - mean), x̂ = U·ŷ + mean. With 8 bits, ŷ has one float32 scale s = max|y| / 127 a vector and
    |y - ŷ| ≤ s/2 in each component; with 16, ŷ is y in float16.

    Args:
        U: [head_dim, rank] with orthonormal columns (checked to 1e-3).
        mean: [head_dim].
        bits: 8 or 16.
        dtype: of what `expand` returns by itself; a cache expands to the model's dtype.

    Raises:
        ShapeError: shapes that do not fit each other, a rank above head_dim, bits other than 8 and 16.
        NonFiniteError: NaN or infinity in U or mean.
        PresetError: columns that are not orthonormal.
        DtypeError: a dtype that is no floating-point type.
    """

    #: Dimension of the stored form that counts tokens.
    coded_token_dim = 2
    #: Tokens that one entry along `coded_token_dim` stands for.
    block_len = 1

    U: Tensor
    mean: Tensor

    def __init__(self, U: Tensor, mean: Tensor, bits: int = 8, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise DtypeError(f"dtype is {dtype!r}, expected a floating-point type such as torch.float16")
        if bits not in (8, 16):
            raise ShapeError(f"bits is {bits}, expected 8 (int8) or 16 (float16)")
        u = torch.as_tensor(U).detach().to(torch.float32)
        m = torch.as_tensor(mean).detach().to(torch.float32)
        if u.device != m.device or u.is_meta:
            raise DeviceError(
                f"U is on {u.device} and mean on {m.device}; put both on one device with memory"
            )
        _check_shared_basis(u, m)
        self.register_buffer("U", u.contiguous())
        self.register_buffer("mean", m.contiguous())
        self.bits = bits
        self.dtype = dtype
        self.native = LowRankCodec(self.U.cpu(), self.mean.cpu(), bits)

    @property
    def head_dim(self) -> int:
        return self.U.shape[0]

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    def compress(self, x: Tensor) -> Tensor:
        """[..., head_dim] to uint8 [..., vector bytes]: rank codes and a float32 scale, or rank float16."""
        if x.shape[-1] != self.head_dim:
            raise ShapeError(
                f"vectors of {x.shape[-1]} components, this compressor's U has head_dim {self.head_dim}"
            )
        n_bytes = self.native.vector_bytes
        if x.device.type == "cpu" and x.dtype in NATIVE_DTYPES:
            flat = x.detach().reshape(-1, self.head_dim).contiguous()
            coded = torch.empty(len(flat), n_bytes, dtype=torch.uint8)
            self.native.encode(flat, coded)
            return coded.view(*x.shape[:-1], n_bytes)
        y = (x.detach().to(torch.float32) - self.mean.to(x.device)) @ self.U.to(x.device)
        if self.bits == 16:
            return y.to(torch.float16).contiguous().view(torch.uint8)
        largest = y.abs().amax(-1, keepdim=True)
        inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
        codes = (y * inverse).round().to(torch.int8).view(torch.uint8)
        return torch.cat([codes, (largest / 127.0).contiguous().view(torch.uint8)], dim=-1)

    def expand(self, coded: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What `compress` gave, to [..., head_dim] in ``dtype`` (by default that of the compressor)."""
        dtype = dtype or self.dtype
        if coded.device.type == "cpu" and dtype in NATIVE_DTYPES:
            flat = coded.reshape(-1, coded.shape[-1]).contiguous()
            x = torch.empty(len(flat), self.head_dim, dtype=dtype)
            self.native.decode(flat, x)
            return x.view(*coded.shape[:-1], self.head_dim)
        if self.bits == 16:
            y = coded.contiguous().view(torch.float16).to(torch.float32)
        else:
            codes, scale = coded.split([self.rank, 4], dim=-1)
            y = codes.view(torch.int8).to(torch.float32) * scale.contiguous().view(torch.float32)
        return (y @ self.U.to(coded.device).T + self.mean.to(coded.device)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.compress(x), x.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        data = (self.U, self.mean, self.bits, self.dtype)
        return (
            by_maker("low rank", *data) if type(self) is QuantizedCalibratedCompressor else (type(self), data)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedCalibratedCompressor:
        return self  # immutable

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, rank={self.rank}, bits={self.bits}"


def _check_shared_basis(u: Tensor, mean: Tensor) -> None:
    if u.dim() != 2 or mean.dim() != 1 or u.shape[0] != mean.shape[0]:
        raise ShapeError(
            f"U has the shape {list(u.shape)} and mean {list(mean.shape)}, expected [head_dim, rank] and [head_dim]"
        )
    if not 1 <= u.shape[1] <= u.shape[0]:
        raise ShapeError(f"rank {u.shape[1]} does not lie in 1 to head_dim = {u.shape[0]}")
    for name, values in (("U", u), ("mean", mean)):
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"{name} holds NaN or infinity; calibrate again")
    gram = u.to(torch.float64).T @ u.to(torch.float64)
    deviation = float((gram - torch.eye(u.shape[1], dtype=torch.float64, device=u.device)).abs().max())
    if deviation > _ORTHONORMAL_LIMIT:
        raise PresetError(
            f"the columns of U are not orthonormal: max |UᵀU - I| is {deviation:.2e}, "
            f"at most {_ORTHONORMAL_LIMIT:.0e} is allowed; orthonormalise it with torch.linalg.qr(U).Q"
        )


class StreamSetCompressor(nn.Module):
    """The calibrated codec of all KV heads of one layer's keys or values. `Preset.codec` makes what it needs.

    Keys are turned to the frame of their block, so a run's position matters: `compress` and `expand` must be
    told the same one.

    Args:
        codec: the native codec.
        n_sinks: first tokens of a sequence that a cache must keep exact.
    """

    coded_token_dim = 1

    def __init__(self, codec: StreamSetCodec, n_sinks: int = 4) -> None:
        super().__init__()
        if not isinstance(codec, StreamSetCodec):
            raise PresetError(
                f"{type(codec).__name__} is not a calibrated codec; take one from Preset.codec(layer, side)"
            )
        if not is_count(n_sinks):
            raise ShapeError(f"n_sinks is {n_sinks!r}, expected a whole number of tokens, at least 0")
        self.native = codec
        self.n_sinks = n_sinks
        # Whose codec it is, where a cache was made from a preset.
        self.preset: Any = None
        self._on_device: dict[torch.device, TorchStreamCodec] = {}

    @property
    def block_len(self) -> int:
        """Tokens in a block."""
        return self.native.block_len

    @property
    def bits_per_value(self) -> float:
        """Bits a value, side information included."""
        return self.native.bits_per_value

    def on_device(self, device: torch.device) -> TorchStreamCodec:
        """The torch implementation of the same format, its tables on ``device``."""
        if device not in self._on_device:
            self._on_device[device] = TorchStreamCodec(self.native, device)
        return self._on_device[device]

    def compress(self, x: Tensor, position: int = 0) -> Tensor:
        """[B, n_kv_heads, n_tokens, head_dim] to packed blocks, uint8 [B, n_tokens / block_len, block bytes].

        Args:
            position: that of the first token, in the sequence.

        Raises:
            ShapeError: other heads or head_dim than the codec's, or tokens that do not fill whole blocks.
            DtypeError: float64 or no floating-point type.
            NonFiniteError: NaN or infinity.
        """
        _check_stream_input(self.native, x, position)
        if x.device.type != "cpu":
            return self.on_device(x.device).encode(x, position)
        n_blocks = x.shape[2] // self.block_len
        packed = torch.empty(x.shape[0], n_blocks, self.native.block_bytes, dtype=torch.uint8)
        self.native.encode(_last_contiguous(x.detach()), position, packed)
        return packed

    def expand(self, coded: Tensor, position: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """What `compress` gave at ``position``, to [B, n_kv_heads, n_tokens, head_dim] in ``dtype``."""
        if coded.device.type != "cpu":
            return self.on_device(coded.device).decode(coded, position, dtype)
        if dtype not in NATIVE_DTYPES:
            raise DtypeError(f"cannot expand to {dtype}, expected float32, bfloat16 or float16")
        shape = (coded.shape[0], self.native.n_heads, coded.shape[1] * self.block_len, self.native.head_dim)
        out = torch.empty(shape, dtype=dtype)
        # A cache may hand over part of a longer run; the native code reads it as one piece.
        self.native.decode(coded.contiguous(), position, out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.compress(x), dtype=x.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        if type(self) is not StreamSetCompressor:
            raise PicklingError(
                f"a {type(self).__name__} cannot be pickled, as its tables lie in native memory: of a plain "
                f"StreamSetCompressor the name of its codec is written, which says nothing of a subclass; give it a "
                f"__reduce__ of its own"
            )
        if self.native.id is None:
            raise PicklingError(
                "a StreamSetCompressor is pickled by the digest of its preset, as its tables lie in native memory, and "
                "this one's codec was made without a preset; take codecs from Preset.codec(layer, side)"
            )
        return by_maker("stream set", *self.native.id, self.n_sinks)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamSetCompressor:
        return self  # immutable

    def extra_repr(self) -> str:
        codec = self.native
        return (
            f"n_kv_heads={codec.n_heads}, head_dim={codec.head_dim}, block_len={codec.block_len}, "
            f"bits_per_value={codec.bits_per_value:.3f}"
        )


def _check_stream_input(codec: StreamSetCodec, x: Tensor, position: int) -> None:
    expected = f"[batch, {codec.n_heads}, a multiple of {codec.block_len} tokens, {codec.head_dim}]"
    fits = x.dim() == 4 and x.shape[1] == codec.n_heads and x.shape[3] == codec.head_dim
    if not fits or x.shape[2] % codec.block_len:
        raise ShapeError(f"vectors of shape {list(x.shape)}, expected {expected}")
    if x.dtype not in NATIVE_DTYPES:
        raise DtypeError(
            f"dtype {x.dtype} cannot be compressed; load the model in float32, bfloat16 or float16"
        )
    if position < 0:
        raise ShapeError(f"position is {position}, expected 0 or more")


def check_fits(compressor: nn.Module, states: Tensor, name: str) -> None:
    """Refuse a model's keys or values, [B, H, T, D], that one of our compressors could not take.

    Raises:
        ShapeError: other KV heads or head_dim than the compressor's.
        DtypeError: a dtype that it cannot code.
    """
    heads, head_dim = states.shape[1], states.shape[3]
    if isinstance(compressor, QuantizedCalibratedCompressor):
        expected_heads, expected_dim = heads, compressor.head_dim
    elif isinstance(compressor, StreamSetCompressor):
        expected_heads, expected_dim = compressor.native.n_heads, compressor.native.head_dim
        if states.dtype not in NATIVE_DTYPES:
            raise DtypeError(
                f"{name} are {states.dtype}, which cannot be compressed; load the model in float32, bfloat16 or float16"
            )
    else:
        return
    for what, given, expected in (
        ("KV heads", heads, expected_heads),
        ("head_dim", head_dim, expected_dim),
    ):
        if given != expected:
            raise ShapeError(
                f"{what} of the {name} is {given}, but the compressor was made for {expected}; use this model's preset"
            )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def granularity(compressor: nn.Module) -> int:
    """Tokens that a compressor codes together."""
    return int(getattr(compressor, "block_len", 1))
