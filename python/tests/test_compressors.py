"""The compressors by themselves: against their formula in float64, and native against torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_helpers import (
    hand_made_compressor,
    low_rank,
    model_of,
    orthonormal,
    preset_of,
    random_kv,
    stream_compressor,
    tokens,
)
from kvlathe import QuantizedCalibratedCompressor, StreamSetCompressor
from kvlathe.compressors import NATIVE_DTYPES
from kvlathe.errors import DtypeError, NonFiniteError, PresetError, ShapeError
from kvlathe.preset import Side
from kvlathe.torch_codec import TorchStreamCodec

CPU = torch.device("cpu")


# The seed's compressor.


def _projected(compressor: QuantizedCalibratedCompressor, x: Tensor) -> Tensor:
    """y = Uᵀ(x - mean) in float64."""
    return (x.double() - compressor.mean.double()) @ compressor.U.double()


def _torch_path(compressor: QuantizedCalibratedCompressor, x: Tensor) -> Tensor:
    """Codes by way of torch: float64 is no native dtype, and holds every float32 exactly."""
    return compressor.compress(x.double())


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_eight_bits_hold_their_bound(rank: int, scale: float) -> None:
    compressor = low_rank(16, rank, bits=8)
    x = scale * random_kv(200)[0]
    y = _projected(compressor, x)
    decoded = compressor.expand(compressor.compress(x), torch.float32)
    y_hat = _projected(compressor, decoded)
    step = y.abs().amax(-1, keepdim=True) / 127
    magnitude = y.abs().amax() + compressor.mean.abs().amax()
    assert bool(((y - y_hat).abs() <= step / 2 * (1 + 1e-3) + 1e-5 * magnitude).all())
    # What is decoded lies in the span of U around the mean.
    outside = (decoded.double() - compressor.mean.double()) - y_hat @ compressor.U.double().T
    assert float(outside.abs().max()) <= 1e-5 * float(magnitude)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_eight_bits_follow_the_formula(rank: int) -> None:
    compressor = low_rank(16, rank, bits=8)
    x = random_kv(500)[0]
    y = _projected(compressor, x)
    step = y.abs().amax(-1, keepdim=True) / 127
    expected = (y / step).round() * step @ compressor.U.double().T + compressor.mean.double()
    decoded = compressor.expand(compressor.compress(x), torch.float32).double()
    # A component on the border of two codes may go either way.
    far = (decoded - expected).abs().amax(-1) > 1e-5
    assert float(far.double().mean()) < 0.01
    coded = compressor.compress(x)
    scale = coded[..., rank:].contiguous().view(torch.float32)
    torch.testing.assert_close(scale.double(), step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_sixteen_bits_follow_the_formula(rank: int) -> None:
    compressor = low_rank(16, rank, bits=16)
    x = random_kv(200)[0]
    coded = compressor.compress(x)
    assert coded.shape[-1] == 2 * rank
    y = _projected(compressor, x)
    torch.testing.assert_close(coded.view(torch.float16).double(), y, rtol=1e-3, atol=1e-5)
    expected = y @ compressor.U.double().T + compressor.mean.double()
    decoded = compressor.expand(coded, torch.float32).double()
    torch.testing.assert_close(decoded, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [8, 16])
def test_full_rank_is_nearly_exact(bits: int) -> None:
    compressor = low_rank(16, 16, bits=bits)
    x = random_kv(100)[0]
    error = (compressor(x) - x).norm() / x.norm()
    assert float(error) < (0.01 if bits == 8 else 1e-3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rank", [3, 12, 16])
def test_native_and_torch_path_are_equal(bits: int, rank: int) -> None:
    compressor = low_rank(16, rank, bits=bits)
    x = random_kv(400)[0]
    native, by_torch = compressor.compress(x), _torch_path(compressor, x)
    assert native.shape == by_torch.shape
    step = _projected(compressor, x).abs().amax(-1, keepdim=True) / 127
    difference = (compressor.expand(native, torch.float64) - compressor.expand(by_torch, torch.float64)).abs()
    assert bool((difference <= 1.01 * step + 1e-5).all())  # at most one code apart
    assert float((difference > 1e-3 * step + 1e-6).any(-1).double().mean()) < 0.02  # and hardly ever that
    # Decoding the same bytes.
    torch.testing.assert_close(
        compressor.expand(native, torch.float32),
        compressor.expand(native, torch.float64).float(),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_low_rank_in_every_dtype(bits: int, dtype: torch.dtype) -> None:
    compressor = low_rank(16, 16, bits=bits)
    x = random_kv(50, dtype=dtype)[0]
    decoded = compressor.expand(compressor.compress(x), dtype)
    assert decoded.dtype == dtype
    assert torch.equal(compressor.compress(x), compressor.compress(x.float()))
    assert float((decoded.float() - x.float()).norm() / x.float().norm()) < 0.02


def test_low_rank_of_extreme_vectors() -> None:
    compressor = QuantizedCalibratedCompressor(orthonormal(16, 16), torch.zeros(16))
    x = torch.zeros(4, 16)
    x[1] = 1e-30
    x[2] = 1e15
    x[3, 3] = 7.0
    decoded = compressor.expand(compressor.compress(x), torch.float32)
    assert torch.isfinite(decoded).all()
    assert not decoded[0].any()
    for row in (2, 3):
        torch.testing.assert_close(decoded[row], x[row], rtol=0.02, atol=0.02 * float(x[row].max()))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (0, 16), (2, 3, 4, 5, 16)])
def test_low_rank_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    compressor = low_rank()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coded = compressor.compress(x)
    assert coded.shape == (*shape[:-1], 16)
    assert compressor.expand(coded).shape == shape


def test_expand_defaults_to_the_compressors_dtype() -> None:
    basis = orthonormal(16, 4)
    x = random_kv(3)[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        compressor = QuantizedCalibratedCompressor(basis, torch.zeros(16), dtype=dtype)
        assert compressor.expand(compressor.compress(x)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_basis_in_another_dtype_is_taken(dtype: torch.dtype) -> None:
    """Float16 bases pass for orthonormal; bfloat16 ones are too coarse."""
    basis, mean = orthonormal(16, 8).to(dtype), torch.zeros(16, dtype=dtype)
    if dtype == torch.bfloat16:
        with pytest.raises(PresetError, match="orthonormal"):
            QuantizedCalibratedCompressor(basis, mean)
    else:
        assert QuantizedCalibratedCompressor(basis, mean).U.dtype == torch.float32


def test_low_rank_on_other_layouts() -> None:
    compressor = low_rank()
    x = random_kv(20)[0]
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    coded = compressor.compress(x)
    assert torch.equal(compressor.compress(strided), coded)
    part = torch.cat([coded, coded], dim=2)[:, :, 5:25]
    assert torch.equal(compressor.expand(part), compressor.expand(part.contiguous()))


def test_compressors_are_shared_by_copies() -> None:
    for compressor in (low_rank(), stream_compressor()):
        assert copy.deepcopy(compressor) is compressor


# The calibrated codec. Names: half-split, interleaved and partial, half-split and partial, interleaved, no rotation.

ROPES = ("llama", "glm", "gpt_neox", "cohere", "gpt2")


def _typical(name: str, side: Side, n_tokens: int, seed: int = 11) -> Tensor:
    """Layer 0's real keys or values of a tiny model, [2, H, n_tokens, D]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model_of(name)(tokens(n_tokens, seed, batch=2), past_key_values=cache)
    layer = cache.layers[0]
    return layer.keys if side == "key" else layer.values


def _different(a: Tensor, b: Tensor) -> float:
    return float((a != b).double().mean())


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("block_len", [8, 16, 32, 64])
@pytest.mark.parametrize("name", ROPES)
def test_torch_and_native_codec_agree(name: str, block_len: int, side: Side) -> None:
    compressor = stream_compressor(name, 4.0, block_len, side=side)
    assert (compressor.native.rope is not None) == (name != "gpt2" and side == "key")
    codec = compressor.on_device(CPU)
    assert isinstance(codec, TorchStreamCodec)
    x = _typical(name, side, 256)
    for position in (0, 4, 1000):
        native = compressor.compress(x, position)
        assert native.shape == (2, 256 // block_len, compressor.native.block_bytes)
        by_torch = codec.encode(x, position)
        assert by_torch.shape == native.shape
        assert _different(native, by_torch) < 0.005
        decoded = compressor.expand(native, position)
        torch.testing.assert_close(
            codec.decode(native, position, torch.float32),
            decoded,
            rtol=1e-5,
            atol=1e-5 * float(x.abs().max()),
        )
        again = codec.decode(by_torch, position, torch.float32)
        assert float((again - x).norm()) <= 1.02 * float((decoded - x).norm())


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_torch_and_native_codec_agree_in_every_dtype(dtype: torch.dtype) -> None:
    compressor = stream_compressor("llama", 4.0)
    x = _typical("llama", "key", 128).to(dtype)
    native, by_torch = compressor.compress(x, 4), compressor.on_device(CPU).encode(x, 4)
    assert _different(native, by_torch) < 0.005
    assert torch.equal(native, compressor.compress(x.float(), 4))
    a, b = compressor.expand(native, 4, dtype), compressor.on_device(CPU).decode(native, 4, dtype)
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(a, b, rtol=0.01 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_torch_and_native_codec_agree_on_extremes() -> None:
    compressor = stream_compressor("llama", 3.0)
    x = _typical("llama", "key", 64)[:1].clone()
    x[:, :, 3] = 0.0
    x[:, :, 9] *= 1e-15  # the format's least gain is 2^-63
    x[:, :, 17] *= 1e12
    x[:, :, 20, 5] = 1e3  # an outlying component
    x[:, :, 30] = 0.0
    x[:, :, 30, 0] = 1.0
    native = compressor.compress(x)
    by_torch = compressor.on_device(CPU).encode(x, 0)
    assert _different(native, by_torch) < 0.02
    decoded = compressor.expand(native)
    torch.testing.assert_close(
        compressor.on_device(CPU).decode(native, 0, torch.float32), decoded, rtol=1e-4, atol=1e-5
    )
    assert not decoded[:, :, 3].any()
    # Error in proportion to the token's own size, however large or outlying.
    error = (decoded - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)
    assert bool((error[:, :, [t for t in range(64) if t != 3]] < 0.9).all())
    assert float(error.median()) < 0.4


WIDTHS = (0, 1, 2, 3, 4, 8)


def _some_basis(d: int) -> Tensor:
    """Not orthogonal, not symmetric, and exact in float16."""
    i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
    return torch.eye(d) + ((i * 5 + j * 3) % 8 - 4) / 64


@pytest.mark.parametrize("block_len", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("widths", [*([w] for w in WIDTHS), list(WIDTHS)], ids=str)
@pytest.mark.parametrize("d", [24, 5])
def test_torch_and_native_codec_agree_on_every_width(d: int, widths: list[int], block_len: int) -> None:
    """Bytes and values, with keys that are turned and an odd head_dim that leaves half a byte of drift."""
    generator = torch.Generator().manual_seed(0)
    compressor = hand_made_compressor(
        (widths * d)[:d],
        mean=torch.linspace(-0.5, 0.5, d),
        basis=_some_basis(d),
        inv_freq=(1.0, 0.25),
        block_len=block_len,
    )
    codec = compressor.on_device(CPU)
    stored = list(compressor.native.tables(0)["widths"])
    assert stored == sorted((widths * d)[:d], reverse=True)
    assert codec.block_bytes == 2 + block_len + (d + 1) // 2 + block_len * sum(stored) // 8
    # Some blocks lie off the mean, each of the tokens has a size of its own, and two are zero.
    offset = 0.5 * torch.randn(2, 1, 4, 1, d, generator=generator)
    x = torch.randn(2, 1, 4, block_len, d, generator=generator) + offset
    x = (x * torch.logspace(-2, 2, block_len)[:, None]).flatten(2, 3)
    x[:, :, 3] = 0.0
    native, by_torch = compressor.compress(x, 40), codec.encode(x, 40)
    assert native.shape == by_torch.shape
    assert _different(native, by_torch) < 0.005
    decoded = compressor.expand(native, 40)
    near = {"rtol": 1e-5, "atol": 1e-5}
    size = x.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    torch.testing.assert_close(codec.decode(native, 40, torch.float32) / size, decoded / size, **near)
    again = codec.decode(by_torch, 40, torch.float32)
    assert float((again - x).norm()) <= 1.01 * float((decoded - x).norm())
    assert not decoded[:, :, 3].any() and not again[:, :, 3].any()


def _both(compressor: StreamSetCompressor) -> list[tuple[Any, Any]]:
    """Encoders and decoders of the native codec and of that in torch."""
    codec = compressor.on_device(CPU)
    return [
        (lambda x: compressor.compress(x), lambda c: compressor.expand(c)),
        (lambda x: codec.encode(x, 0), lambda c: codec.decode(c, 0, torch.float32)),
    ]


def _drift_codes(packed: Tensor, d: int, block_len: int) -> Tensor:
    """[n_blocks, d] of the first row of a batch."""
    stored = packed[0, :, 2 + block_len : 2 + block_len + (d + 1) // 2].int()
    return torch.cat([stored & 15, stored >> 4], dim=-1)[:, :d]


@pytest.mark.parametrize("width", [0, 1, 2, 3, 4])
def test_what_a_block_has_in_common_costs_little(width: int) -> None:
    """The same tokens, in two blocks that lie on either side of the mean, and mixed, so that no block has drift."""
    d, n = 16, 32
    generator = torch.Generator().manual_seed(1)
    offset = torch.randn(d, generator=generator).sign()
    one, other = 0.5 * torch.randn(2, n, d, generator=generator) + torch.stack([offset, -offset])[:, None]
    apart, mixed = torch.cat([one, other]), torch.stack([one, other], dim=1).flatten(0, 1)
    # Tokens are coded in units of their own size, √1.25 here, and a standard deviation is 0.6 of that.
    compressor = hand_made_compressor([width] * d, basis=0.6 * torch.eye(d), block_len=n)
    shared = offset / 1.25**0.5 / 0.6
    for encode, decode in _both(compressor):
        errors = []
        for x in (apart, mixed):
            packed = encode(x[None, None])
            errors.append(float((decode(packed)[0, 0] - x).norm()))
            levels = _drift_codes(packed, d, n) - 8
            expected = torch.stack([shared, -shared]) if x is apart else torch.zeros(2, d)
            off = (levels - (expected / 0.1875).clamp(-8, 7)).abs()  # levels reach from -8 to 7
            # To half a level and what 32 tokens, that lie 0.75 about their mean, leave to chance.
            assert float(off.max()) < 0.5 + 3 * 0.75 / 32**0.5 / 0.1875
        assert errors[0] < 0.85 * errors[1], errors


@pytest.mark.parametrize("n", [8, 64])
def test_an_outlying_token_does_not_move_the_drift(n: int) -> None:
    """What a token may add is clamped to four standard deviations, so that one of n changes the mean by at most 8/n."""
    d = 16
    compressor = hand_made_compressor([2] * d, mean=torch.ones(d), basis=0.125 * torch.eye(d), block_len=n)
    x = 1 + 0.125 * torch.randn(n, d, generator=torch.Generator().manual_seed(2))
    outlying = x.clone()
    # As long as the others, and 24 standard deviations off in one component, 8 in the rest.
    outlying[n // 2] = 4.0 * (torch.arange(d) == 5)
    others = torch.arange(n) != n // 2
    for encode, decode in _both(compressor):
        before, after = (encode(t[None, None]) for t in (x, outlying))
        moved = (_drift_codes(after, d, n) - _drift_codes(before, d, n)).abs()
        assert int(moved.max()) <= math.ceil(8 / n / 0.1875)
        errors = [float((decode(c)[0, 0] - t)[others].norm()) for c, t in ((before, x), (after, outlying))]
        assert errors[1] < (1.25 if n == 8 else 1.05) * errors[0]


@pytest.mark.parametrize("name", ROPES)
def test_error_falls_with_bits(name: str) -> None:
    for side in ("key", "value"):
        x = _typical(name, side, 128)
        errors = []
        for bits in (1.0, 2.0, 4.0, 6.0, 8.0):
            # The rate is the model's: one side may get less than its share, but not less than at a lower rate.
            compressor = stream_compressor(name, bits, side=side)
            decoded = compressor.expand(compressor.compress(x))
            errors.append(float((decoded - x).norm() / x.norm()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.02
        assert errors[0] > 10 * errors[-1]


def test_position_matters_for_keys_only() -> None:
    x = _typical("llama", "key", 64)
    keys, values = stream_compressor("llama", 4.0), stream_compressor("llama", 4.0, side="value")
    assert not torch.equal(keys.compress(x, 0), keys.compress(x, 64))
    assert torch.equal(values.compress(x, 0), values.compress(x, 64))
    coded = keys.compress(x, 128)
    right, wrong = keys.expand(coded, 128), keys.expand(coded, 0)
    assert float((right - x).norm() / x.norm()) < 0.3
    assert float((wrong - x).norm() / x.norm()) > 0.5


def test_blocks_stand_for_themselves() -> None:
    """A block's bytes depend on its tokens and its position only."""
    compressor = stream_compressor("llama", 4.0)
    x = _typical("llama", "key", 64)
    whole = compressor.compress(x, 4)
    for block in range(8):
        part = x[:, :, 8 * block : 8 * block + 8].contiguous()
        assert torch.equal(compressor.compress(part, 4 + 8 * block), whole[:, block : block + 1])
        assert torch.equal(
            compressor.expand(whole[:, block : block + 1], 4 + 8 * block),
            compressor.expand(whole, 4)[:, :, 8 * block : 8 * block + 8],
        )
    # Parts of a longer run and swapped rows are strided: read rightly all the same.
    assert torch.equal(compressor.expand(whole.flip(0), 4), compressor.expand(whole, 4).flip(0))
    wide = torch.cat([whole, whole], dim=-1)[..., : whole.shape[-1]]
    assert torch.equal(compressor.expand(wide, 4), compressor.expand(whole, 4))


def test_coding_again_what_was_decoded_loses_little() -> None:
    """After a rollback the rest of a block is coded a second time."""
    compressor = stream_compressor("llama", 4.0)
    x = _typical("llama", "key", 128)
    once = compressor.expand(compressor.compress(x, 4), 4)
    twice = compressor.expand(compressor.compress(once, 4), 4)
    assert float((twice - x).norm()) < 1.25 * float((once - x).norm())


def test_stream_compressor_describes_itself() -> None:
    compressor = stream_compressor("llama", 4.0)
    preset = preset_of("llama", 4.0)
    mean = sum(
        StreamSetCompressor(preset.codec(layer, side)).bits_per_value  # type: ignore[arg-type]
        for layer in range(2)
        for side in ("key", "value")
    )
    assert mean / 4 == pytest.approx(preset.bits_per_value, abs=1e-6)
    assert 3.9 < preset.bits_per_value - preset.side_bits_per_value <= 4.0
    # Two bytes, one a token and half a one a coefficient, for 8 tokens of 16 numbers.
    assert preset.side_bits_per_value == 8 * (2 + 8 + 8) / (8 * 16)
    assert (compressor.block_len, compressor.n_sinks, compressor.coded_token_dim) == (8, 4, 1)
    assert "n_kv_heads=2, head_dim=16, block_len=8" in repr(compressor)
    expected = 8 * 8 * compressor.native.block_bytes / (2 * 16 * 8) / 8
    assert compressor.bits_per_value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "position", "error"),
    [
        (torch.zeros(1, 3, 8, 16), 0, ShapeError),
        (torch.zeros(1, 2, 8, 32), 0, ShapeError),
        (torch.zeros(1, 2, 9, 16), 0, ShapeError),
        (torch.zeros(2, 8, 16), 0, ShapeError),
        (torch.zeros(1, 2, 8, 16), -1, ShapeError),
        (torch.zeros(1, 2, 8, 16, dtype=torch.float64), 0, DtypeError),
        (torch.zeros(1, 2, 8, 16, dtype=torch.int32), 0, DtypeError),
        (torch.full((1, 2, 8, 16), torch.nan), 0, NonFiniteError),
        (torch.full((1, 2, 8, 16), torch.inf), 0, NonFiniteError),
        (torch.full((1, 2, 8, 16), 1e30), 0, NonFiniteError),
    ],
)
def test_stream_compressor_refuses(x: Tensor, position: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        stream_compressor().compress(x, position)


def test_the_torch_codec_refuses_what_the_native_one_does() -> None:
    codec = stream_compressor().on_device(CPU)
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        x = torch.zeros(1, 2, 8, 16)
        x[0, 1, 3, 4] = value
        with pytest.raises(NonFiniteError):
            codec.encode(x, 0)


@pytest.mark.parametrize(
    "coded",
    [
        torch.zeros(1, 1, 7, dtype=torch.uint8),
        torch.zeros(1, 7, dtype=torch.uint8),
        torch.zeros(1, 1, 84, dtype=torch.float32),
    ],
    ids=["other_bytes", "two_dimensions", "no_bytes"],
)
def test_expand_refuses_what_is_no_block(coded: Tensor) -> None:
    with pytest.raises((ShapeError, DtypeError)):
        stream_compressor().expand(coded)


def test_garbage_blocks_decode_to_finite_numbers() -> None:
    """Any bytes are a block: decoding must not fail, and float16 must not overflow."""
    compressor = stream_compressor("llama", 3.0)
    generator = torch.Generator().manual_seed(0)
    coded = torch.randint(
        0, 256, (2, 16, compressor.native.block_bytes), generator=generator, dtype=torch.uint8
    )
    for codec in (compressor.expand, compressor.on_device(CPU).decode):
        decode: Any = codec
        for dtype in (torch.float32, torch.float16):
            assert not decode(coded, 0, dtype).isnan().any()


def test_a_stream_compressor_needs_a_codec() -> None:
    with pytest.raises(PresetError, match=r"Preset\.codec"):
        StreamSetCompressor("llama")  # type: ignore[arg-type]
