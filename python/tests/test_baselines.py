"""Baselines against hand-made numbers, independent implementations and their papers' figures."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_helpers import model_of, random_kv, tokens
from kvlathe import baselines
from kvlathe.calibration.layer_probe import HeldLayer
from kvlathe.calibration.rope_probe import ModelShape, ProbeResult, RopeProbe, probe_rope, rotate
from kvlathe.cli import build_parser
from kvlathe.errors import EvaluationError
from kvlathe.lab.baselines import Subject
from kvlathe.lab.baselines.kivi import Kivi
from kvlathe.lab.baselines.kvquant import KvQuant
from kvlathe.lab.baselines.llama_cpp import LlamaCpp, RotatedLlamaCpp, hadamard
from kvlathe.lab.baselines.lloyd_max import lloyd_max, nearest
from kvlathe.lab.baselines.rank_int8 import RankInt8
from kvlathe.lab.baselines.sample import LayerSample
from kvlathe.lab.baselines.turboquant import TurboQuant, codebook, random_rotation
from releases import LACKS_FP8, needs_fp8

SHAPE = ModelShape(n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64)
ROPE = RopeProbe("half_split", 64, 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32), 0.0)


def keys(n_tokens: int = 64, seed: int = 0) -> Tensor:
    """[1, 2, n_tokens, 64] with channels of very different sizes, as keys have."""
    x, _ = random_kv(n_tokens, dim=64, seed=seed)
    return x * torch.logspace(-1, 1, 64) + 3.0


# llama.cpp


def ggml_q8_0(block: np.ndarray) -> np.ndarray:
    """quantize_row_q8_0_ref and dequantize_row_q8_0, number by number."""
    d = np.float32(np.abs(block).max() / np.float32(127))
    inverse = np.float32(1) / d if d else np.float32(0)
    stored = np.float32(np.float16(d))
    return np.array([stored * math.copysign(math.floor(abs(v * inverse) + 0.5), v) for v in block])


def ggml_q4_0(block: np.ndarray) -> np.ndarray:
    """quantize_row_q4_0_ref and dequantize_row_q4_0, number by number."""
    largest = block[np.abs(block).argmax()]
    d = np.float32(largest / np.float32(-8))
    inverse = np.float32(1) / d if d else np.float32(0)
    stored = np.float32(np.float16(d))
    return np.array([stored * (min(15, int(v * inverse + np.float32(8.5))) - 8) for v in block])


@pytest.mark.parametrize(("bits", "reference"), [(8, ggml_q8_0), (4, ggml_q4_0)])
def test_llama_cpp_blocks(bits: int, reference: Callable[[np.ndarray], np.ndarray]) -> None:
    x = keys(5)
    x[0, 0, 2] = 0.0  # a block of zeros
    coded = LlamaCpp(SHAPE, bits).code(0, "key", x, 4)
    for head in range(2):
        for token in range(5):
            for start in (0, 32):
                block = x[0, head, token, start : start + 32].numpy()
                expected = reference(block)
                found = coded[0, head, token, start : start + 32].numpy()
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_llama_cpp_rows_go_through_all_heads() -> None:
    """Two heads of 16 share a block of 32, and so its scale."""
    shape = ModelShape(1, 2, 2, 16)
    x = torch.zeros(1, 2, 1, 16)
    x[0, 0, 0, 0], x[0, 1, 0, 3] = 127.0, 0.4
    coded = LlamaCpp(shape, 8).code(0, "key", x, 0)
    assert coded[0, 0, 0, 0] == 127.0
    assert coded[0, 1, 0, 3] == 0.0  # rounded away by the other head's scale of 1
    assert LlamaCpp(shape, 8).coded_bytes(0, "key", 10) == 10 * 34


def test_hadamard_matrix() -> None:
    expected = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]])
    assert torch.equal(hadamard(4), expected)
    for n in (64, 96, 128):
        h = hadamard(n)
        assert torch.allclose(h @ h.T, torch.eye(n), atol=1e-6)
    assert torch.count_nonzero(hadamard(96)[0]) == 32  # three blocks of 32


def test_the_rotation_spreads_outliers() -> None:
    """One channel of large numbers spoils its whole block; turned, its error is spread over all channels."""
    x, _ = random_kv(256, dim=64)
    x[..., 7] += 40.0
    plain, turned = (
        (method(SHAPE, 4).code(0, "key", x, 0) - x).square().mean() for method in (LlamaCpp, RotatedLlamaCpp)
    )
    assert turned < plain / 2


# KIVI


def kivi_group(x: np.ndarray, bits: int) -> np.ndarray:
    lo = np.float32(np.float16(x.min()))
    scale = np.float32(np.float16((x.max() - x.min()) / (2**bits - 1)))
    if scale == 0:
        return np.full_like(x, lo)
    return scale * np.clip(np.rint((x - lo) / scale), 0, 2**bits - 1) + lo


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups(bits: int) -> None:
    """Keys: 32 tokens of one channel. Values: 32 channels of one token."""
    x = keys(64)
    x[0, 1, :32, 5] = 1.5  # a constant group
    method = Kivi(SHAPE, bits)
    coded_keys, coded_values = (method.code(0, side, x, 4).numpy() for side in ("key", "value"))  # type: ignore[arg-type]
    for head in range(2):
        for start in (0, 32):
            for at in range(64):
                group = x[0, head, start : start + 32, at].numpy()
                found = coded_keys[0, head, start : start + 32, at]
                np.testing.assert_allclose(found, kivi_group(group, bits), rtol=1e-5, atol=1e-5)
                group = x[0, head, at, start : start + 32].numpy()
                found = coded_values[0, head, at, start : start + 32]
                np.testing.assert_allclose(found, kivi_group(group, bits), rtol=1e-5, atol=1e-5)


# TurboQuant


def gaussian_levels(bits: int) -> tuple[Tensor, float]:
    """Lloyd-Max levels of N(0, 1), and their mean squared error by numerical integration."""
    t = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-t.square() / 2)
    levels = lloyd_max(t, density, 2**bits)
    error = ((t - nearest(t, levels)).square() * density).sum() / density.sum()
    return levels, float(error)


@pytest.mark.parametrize(
    ("bits", "positive", "error"),
    [
        (1, [0.7979], 0.3634),
        (2, [0.4528, 1.5104], 0.1175),
        (3, [0.2451, 0.7560, 1.3439, 2.1520], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], 0.009497),
    ],
)
def test_lloyd_max_on_a_gaussian(bits: int, positive: list[float], error: float) -> None:
    """Table I of Max, "Quantizing for minimum distortion", 1960."""
    levels, found = gaussian_levels(bits)
    expected = [-level for level in reversed(positive)] + positive
    assert levels.tolist() == pytest.approx(expected, abs=2e-3 if bits == 4 else 3e-4)
    assert found == pytest.approx(error, rel=1e-3)


def test_the_codebook_tends_to_the_gaussians() -> None:
    levels, _ = gaussian_levels(2)
    assert (codebook(4096, 2) * 64).tolist() == pytest.approx(levels.tolist(), abs=1e-3)
    # In three dimensions a coordinate is uniform on [-1, 1] (Archimedes), whose best levels are evenly spaced.
    assert codebook(3, 2).tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75], abs=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.117), (3, 0.034), (4, 0.0094)])
def test_turboquant_error(bits: int, error: float) -> None:
    """Theorem 1 of the paper: 0.117, 0.03 and 0.009 of a vector's square at 2, 3 and 4 bits, whatever the vector."""
    method = TurboQuant(SHAPE, bits)
    x = keys(512)
    coded = method.code(0, "key", x, 0)
    relative = (coded - x).square().sum(-1) / x.square().sum(-1)
    assert float(relative.mean()) == pytest.approx(error, rel=0.06)
    # Direction and size are coded apart.
    assert torch.allclose(method.code(0, "key", 256 * x, 0), 256 * coded, rtol=2e-3, atol=1e-2)
    assert not method.code(0, "key", torch.zeros_like(x), 0).any()


def test_random_rotations_are_orthogonal() -> None:
    rotation = random_rotation(64)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)
    assert not torch.equal(rotation, random_rotation(64, seed=1))


# KVQuant


def calibrated(still: Tensor, values: Tensor, first: int = 4) -> LayerSample:
    """A sample of keys that are ``still`` [1, H, T, D] before RoPE."""
    sample = LayerSample(SHAPE)
    positions = torch.arange(first, first + still.shape[2])
    sample.add(rotate(still, positions, ROPE.inv_freq, ROPE.pairing).float(), values, ROPE, first)
    return sample


def _probe(shape: ModelShape, rope: RopeProbe | None) -> ProbeResult:
    """What a model of this shape is found to be, without one."""
    layer = HeldLayer(torch.nn.Identity(), shape.n_kv_heads, shape.head_dim, shape.head_dim)
    return ProbeResult([layer] * shape.n_layers, shape.n_heads, [rope] * shape.n_layers)


def kvquant(bits: int, sample: LayerSample) -> KvQuant:
    return KvQuant(_probe(SHAPE, ROPE), bits, lambda: [sample], "text")


def test_kvquant_codes_keys_before_rope() -> None:
    """Channels that take four values before RoPE survive 2 bits at any position, each at its own scale."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 4, (1, 2, 256, 64), generator=generator).float()
    scale, offset = torch.logspace(-1, 1, 64), torch.linspace(-5, 5, 64)
    still = scale * steps + offset
    method = kvquant(2, calibrated(still, still))
    positions = torch.arange(1000, 1256)
    rotated = rotate(still, positions, ROPE.inv_freq, ROPE.pairing).float()
    coded = method.code(0, "key", rotated, 1000)
    assert float((coded - rotated).abs().max()) < 0.02  # ranges are kept in float16
    # Told the wrong position it cannot undo the rotation.
    assert float((method.code(0, "key", rotated, 0) - rotated).abs().max()) > 1.0


def test_kvquant_clips_at_calibrated_ranges() -> None:
    still, values = random_kv(256, dim=64)
    method = kvquant(4, calibrated(still, values))
    coded = method.code(0, "key", torch.full((1, 2, 1, 64), 100.0), 0)  # position 0 is not rotated
    highest = still[0].amax(1)
    assert (coded[0, :, 0] <= highest * 1.01).all()
    assert (coded[0, :, 0] >= highest * 0.7).all()


def test_kvquant_scales_values_by_token() -> None:
    still, values = random_kv(256, dim=64)
    method = kvquant(3, calibrated(still, values))
    sizes = torch.logspace(-3, 3, 256)[:, None]
    coded = method.code(0, "value", values * sizes, 0)
    error = ((coded - values * sizes) / sizes).square().mean((0, 1, 3))
    assert float(error.max()) < 5 * float(error.min())
    # 64 Gaussian numbers have a range of 4.74 on average (Tippett): seven uniform steps over it, s²/12 each.
    uniform = (4.74 / 7) ** 2 / 12
    assert 0.5 * uniform < float(error.mean()) < uniform


# Rank and int8


def test_rank_int8_keeps_a_subspace() -> None:
    """Vectors in an affine subspace of 48 dimensions lose only int8's rounding; others lose what sticks out."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 64, generator=generator)
    x = torch.randn(1, 2, 500, 48, generator=generator) @ directions + 5.0
    sample = LayerSample(SHAPE)
    sample.add(x, x, None, 0)
    method = RankInt8(SHAPE, ("value",), lambda: [sample], "text")
    error = (method.code(0, "value", x, 0) - x).norm(dim=-1) / x.norm(dim=-1)
    assert float(error.max()) < 0.02
    other, _ = random_kv(10, dim=64)
    assert float((method.code(0, "value", other, 0) - other).norm() / other.norm()) > 0.2
    assert method.code(0, "key", x, 0) is x


# Hugging Face


def subject(name: str = "llama") -> Subject:
    model = model_of(name)
    return Subject(model, probe_rope(model), 4, lambda: [tokens(96, seed)[0] for seed in range(2)])


@needs_fp8
def test_hugging_face_fp8() -> None:
    """One scale for a whole tensor, so that its largest number is float8_e4m3fn's largest, 448."""
    method = baselines.make("hf-fp8", subject())
    x, _ = random_kv(64)
    scale = x.abs().max() / 448
    expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.allclose(method.code(0, "key", x, 0), expected)
    assert torch.allclose(method.code(0, "value", 3 * x, 0), 3 * expected, rtol=1e-5)


@needs_fp8
def test_hugging_face_refuses_sliding_windows() -> None:
    """What transformers does not run is not run here, and the reason is its own."""
    with pytest.raises(EvaluationError, match="full attention"):
        baselines.make("hf-fp8", subject("gemma3"))


@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum")])
def test_hugging_face_backends_that_are_missing(backend: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(EvaluationError, match=rf"(?i)install.*{package}"):
        baselines.make(f"hf-{backend}-4", subject())


# All of them


def made(name: str, shape: ModelShape) -> Any:
    """A baseline for a model that need not exist."""
    stand_in: Any = Subject(model_of("llama"), _probe(shape, None), 4, lambda: [tokens(8)[0]])
    return baselines.make(name, stand_in)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q4_0-hadamard", 4.5),
        ("kivi-4", 5.0),
        ("kivi-2", 3.0),
        ("turboquant-4", 4 + 16 / 128),
        ("turboquant-3", 3 + 16 / 128),
        ("turboquant-2", 2 + 16 / 128),
        ("kvquant-4", 4 + 32 / 128 / 2),  # two float16 a value vector, none a key
        ("rank-int8-kv", (96 * 8 + 32) / 128),
        ("rank-int8-v", (16 + (96 * 8 + 32) / 128) / 2),
        pytest.param("hf-fp8", 8.0, marks=needs_fp8),
    ],
)
def test_bits_are_those_of_the_paper(name: str, bits: float) -> None:
    shape = ModelShape(1, 8, 4, 128)
    method = made(name, shape)
    n_tokens = 1024
    n_bytes = method.coded_bytes(0, "key", n_tokens) + method.coded_bytes(0, "value", n_tokens)
    assert 8 * n_bytes / (2 * 4 * 128 * n_tokens) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("name", baselines.NAMES)
def test_every_baseline_codes_a_model(name: str) -> None:
    """Shapes and dtypes come back, and more error than none but less than the numbers themselves."""
    try:
        method = baselines.make(name, subject())
    except EvaluationError as error:
        if not name.startswith(("hf-quanto", "hf-hqq")) and not (name == "hf-fp8" and LACKS_FP8):
            raise
        pytest.skip(str(error))
    assert method.name == name
    n_tokens = 2 * method.group_len * 8
    for side, x in zip(("key", "value"), random_kv(n_tokens), strict=True):
        coded = method.code(1, side, x, 4)  # type: ignore[arg-type]
        assert coded.shape == x.shape and coded.dtype == x.dtype
        exact = name == "rank-int8-v" and side == "key"
        assert exact == torch.equal(coded, x)
        # The calibrated ones have seen the tiny model's text and not these numbers.
        if not name.startswith(("kvquant", "rank")):
            assert float((coded - x).square().mean()) < 0.3 * float(x.square().mean())


def test_there_is_no_other_baseline() -> None:
    with pytest.raises(EvaluationError, match=r"kivi-3.*kivi-4"):
        baselines.make("kivi-3", subject())


def test_help_names_every_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["eval", "--help"])
    words = capsys.readouterr().out.split()
    assert set(baselines.NAMES) <= set(words)
