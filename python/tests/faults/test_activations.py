"""Adversarial keys and values: the quantiser's bound holds for every token, and attention from the blocks with it.

The bound (docs/block_format.md) has three parts.

* Gains: 14 of a block's spacings, each 2^k/32 octaves, reach from its largest gain to its smallest, and no smaller k
  does that. A token's gain is off by half a spacing at most, beside the half code by which gains are rounded first.
* Drift: within half a level, 0.1875 standard deviations, of the mean over the block's tokens, each clamped to ±4; the
  last levels stand for all that lies beyond.
* Coefficients, drift taken out: with s₀ the smallest guard factor under which none clips, the weighted error of a
  token, Σ λᵢ·(zᵢ − ẑᵢ)², is at most Σ λᵢ·(s₀·Δᵢ/2)². Those of width 0 have drift only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_helpers import compressed_cache, handed_out, low_rank, one_layer_cache, preset_of, tokens
from kvlathe import (
    CalibrationOptions,
    CompressedDynamicCache,
    NonFiniteError,
    StreamSetCompressor,
    calibrate,
)
from kvlathe.preset import Side
from tiny_models import tiny

HEADS, DIM, BLOCK_LEN, N_TOKENS, N_SINKS = 2, 16, 8, 84, 4
_GUARDS = np.array([0.75, 0.84, 0.92, 1, 1.09, 1.19, 1.3, 1.42, 1.6, 1.85, 2.3, 3.2, 6, 24, 256, 16384])


def _noise(seed: int = 0) -> Tensor:
    return torch.randn(1, HEADS, N_TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def _with(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    x = x.clone()
    change(x)
    return x


def _set(x: Tensor, where: Any, value: float | Tensor) -> None:
    x[where] = value


_BIAS = torch.randn(DIM, generator=torch.Generator().manual_seed(9)) * 1e4
_SCALES = torch.logspace(-17, 16, N_TOKENS)[:, None]
ACTIVATIONS: dict[str, Tensor] = {
    "zeros": torch.zeros(1, HEADS, N_TOKENS, DIM),
    "zeros between": _with(_noise(), lambda x: _set(x, np.s_[:, :, ::2], 0.0)),
    "negative zeros": torch.full((1, HEADS, N_TOKENS, DIM), -0.0),
    "one huge component": _with(_noise(), lambda x: _set(x, np.s_[..., 3], 1e4)),
    "one huge component in one token": _with(_noise(), lambda x: _set(x, np.s_[0, 0, 40, 3], 1e12)),
    "one component": _with(torch.zeros(1, HEADS, N_TOKENS, DIM), lambda x: _set(x, np.s_[..., 5], 7.0)),
    "one component in turn": torch.eye(DIM).repeat(6, 1)[None, None, :N_TOKENS].expand(1, HEADS, -1, -1),
    "denormals": _noise() * 1e-40,
    "smallest denormals": torch.full((1, HEADS, N_TOKENS, DIM), 1e-45),
    "below the least gain": _noise() * 1e-20,
    "about the least gain": _noise() * 2.0**-63,
    "constant": _noise()[:, :, :1].expand(-1, -1, N_TOKENS, -1),
    "equal components": torch.ones(1, HEADS, N_TOKENS, DIM),
    "two signs": torch.tensor([1.0, -1.0]).repeat(DIM // 2).expand(1, HEADS, N_TOKENS, DIM),
    "every scale": _noise() * _SCALES,
    "biases of 1e4": _noise() + _BIAS,
    "biases of 1e4 alone": _BIAS.expand(1, HEADS, N_TOKENS, DIM),
    "largest": torch.full((1, HEADS, N_TOKENS, DIM), 1e17),
    "largest, both signs": _noise().sign() * 1e17,
    "heavy tails": _noise() ** 9,
}
_BITS = [1.0, 3.0, 6.0]


class PlainStreams(StreamSetCompressor):
    """The calibrated codec by way of the torch store."""


def _codec(side: Side, bits: float) -> StreamSetCompressor:
    preset = preset_of("llama", bits, BLOCK_LEN)
    return StreamSetCompressor(preset.codec(0, side), N_SINKS)


def _frame(x: np.ndarray, codec: Any) -> np.ndarray:
    """[heads, tokens, d] of coded tokens, each turned back by its block's centre."""
    if codec.rope is None:
        return x
    pairing, rotary_dim, inv_freq = codec.rope
    assert pairing == "half_split"
    at = np.arange(x.shape[1])
    centres = at // BLOCK_LEN * BLOCK_LEN + BLOCK_LEN // 2
    angles = -centres[:, None] * np.array(inv_freq)
    half = rotary_dim // 2
    a, b = x[..., :half], x[..., half:rotary_dim]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate([*turned, x[..., rotary_dim:]], axis=-1)


def _assert_within_the_bound(
    given: Tensor, packed: Tensor, held: Tensor, compressor: StreamSetCompressor, turned: float
) -> None:
    """Each coded token by itself, in float64, from the codec's tables.

    Args:
        given: tokens [1, H, n, D].
        packed: what they were coded to, [1, n / block_len, block bytes].
        held: what that stands for, [1, H, n, D].
        turned: relative error of rotations in float32.
    """
    codec = compressor.native
    x, decoded = (_frame(t[0].double().numpy(), codec) for t in (given, held))
    at = 0
    for head in range(HEADS):
        tables = codec.tables(head)
        widths = np.frombuffer(tables["widths"], np.uint8).astype(int)
        n_bytes = 2 + BLOCK_LEN + DIM // 2 + BLOCK_LEN * int(widths.sum()) // 8
        blocks = packed[0, :, at : at + n_bytes].numpy().astype(int)
        at += n_bytes
        for block, of_head in enumerate(blocks):
            tokens_ = slice(block * BLOCK_LEN, (block + 1) * BLOCK_LEN)
            _assert_block_within_the_bound(x[head, tokens_], of_head, decoded[head, tokens_], tables, turned)
    assert at == codec.block_bytes


def _assert_block_within_the_bound(
    x: np.ndarray, packed: np.ndarray, decoded: np.ndarray, tables: dict[str, bytes], turned: float
) -> None:
    widths = np.frombuffer(tables["widths"], np.uint8).astype(int)
    analysis, coded_mean, cost, units = (
        np.frombuffer(tables[name], np.float32).astype(np.float64)
        for name in ("analysis", "coded_mean", "step_cost", "drift_units")
    )
    analysis, means = analysis.reshape(DIM, DIM), coded_mean.reshape(DIM, BLOCK_LEN).T

    # Gains. float32 sums underflow where float64 ones would not.
    side = packed[2 : 2 + BLOCK_LEN]
    largest, spacing, fall = packed[0] | (packed[1] & 15) << 8, packed[1] >> 4, side & 15
    mean_square = ((x.astype(np.float32) ** 2).sum(-1, dtype=np.float32) / DIM).astype(np.float64)
    code = 16 * np.log2(np.maximum(mean_square, 1e-300)) + 2048
    zero = fall == 15
    assert (zero | (code >= 0.49)).all() and (~zero | (code <= 0.51)).all()
    assert not decoded[zero].any()
    assert (np.linalg.norm(x[zero], axis=-1) <= math.sqrt(DIM) * 2.0**-63).all()
    if zero.all():
        assert largest == spacing == 0
        return
    stated = np.maximum(largest - (fall << spacing), 1)
    off = np.abs(np.minimum(code, 4095) - stated)[~zero]
    assert (off <= 2**spacing / 2 * (spacing > 0) + 0.51).all(), (off, spacing)
    reached = code[~zero].max() - code[~zero].min()
    assert spacing == 0 or 14 * 2 ** (spacing - 1) < reached + 1.02
    gain = np.where(zero, 0.0, 2.0 ** ((stated - 2048) / 32))

    # Drift, in steps.
    inverse = np.where(zero, 0.0, 1 / np.where(zero, 1.0, gain))[:, None]
    given_steps, decoded_steps = (
        np.where(zero[:, None], 0.0, (v * inverse) @ analysis.T - means) for v in (x, decoded)
    )
    rounding = turned * np.abs(given_steps).max(-1, keepdims=True) + 1e-4
    nibbles = packed[2 + BLOCK_LEN : 2 + BLOCK_LEN + DIM // 2]
    level = np.concatenate([nibbles & 15, nibbles >> 4]) - 8
    reach = units * (4 / 0.1875)
    mean = np.clip(given_steps, -reach, reach)[~zero].mean(0) / units
    within = np.abs(level - np.clip(mean, -8, 7)) <= 0.5 + rounding.mean() / units
    assert within.all(), (level, mean)

    # Coefficients. What has drift only decodes to it.
    steps = given_steps - level * units
    only_drift = np.abs(decoded_steps - level * units)[~zero][:, widths == 0]
    decoded_size = np.abs(decoded_steps).max(-1, keepdims=True)[~zero]
    assert (only_drift <= turned * decoded_size + 1e-4).all()
    coded = widths > 0
    half_levels = 2.0 ** (widths[coded] - 1)
    ratio = (np.abs(steps[:, coded]) / half_levels).max(-1, initial=0.0)
    guard = np.searchsorted(_GUARDS, ratio * (1 - 1e-5))
    assert (guard < 16).all()
    error = (cost * (given_steps - decoded_steps) ** 2)[:, coded].sum(-1)
    bound = (cost[coded] * (_GUARDS[guard, None] / 2) ** 2).sum(-1)
    # Rounding of the decoded numbers, and of the rotation, against the size of the vector.
    slack = (cost[coded] * rounding**2).sum(-1)
    kept = zero | (error <= (np.sqrt(bound) + np.sqrt(slack)) ** 2)
    assert kept.all(), (error[~kept], bound[~kept])


@pytest.mark.parametrize("bits", _BITS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_quantisers_bound_holds(name: str, bits: float) -> None:
    """By the native codec and by that in torch, as keys and as values; and both stores hold what the codec gives."""
    x = ACTIVATIONS[name]
    keys, values = _codec("key", bits), _codec("value", bits)
    coded = slice(N_SINKS, 80)
    # As a cache does it: the sinks' places in the first block are empty.
    middle = torch.cat([torch.zeros_like(x[:, :, :N_SINKS]), x[:, :, coded]], dim=2)
    expected = []
    for compressor in (keys, values):
        packed = compressor.compress(middle)
        whole = compressor.expand(packed)
        expected.append(whole[:, :, N_SINKS:])
        _assert_within_the_bound(middle, packed, whole, compressor, 1e-5)
        in_torch = compressor.on_device(torch.device("cpu"))
        packed = in_torch.encode(middle, 0)
        decoded = in_torch.decode(packed, 0, torch.float32)
        _assert_within_the_bound(middle, packed, decoded, compressor, 1e-5)
    for store in (StreamSetCompressor, PlainStreams):
        cache = one_layer_cache(store(keys.native, N_SINKS), store(values.native, N_SINKS))
        cache.update(x, x, 0)
        layer = cache.layers[0]
        assert layer.n_coded == 80 - N_SINKS
        for held, decoded in zip((layer.keys, layer.values), expected, strict=True):
            assert bool(held.isfinite().all())
            for exact in (slice(N_SINKS), slice(coded.stop, None)):
                assert torch.equal(held[:, :, exact], x[:, :, exact])
            assert torch.equal(held[:, :, coded], decoded)
            assert held.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_half_formats_stay_finite(name: str, dtype: torch.dtype) -> None:
    x = ACTIVATIONS[name].clamp(-65504, 65504).to(dtype)
    cache = one_layer_cache(_codec("key", 3.0), _codec("value", 3.0))
    cache.update(x, x, 0)
    for held in (cache.layers[0].keys, cache.layers[0].values):
        assert held.dtype == dtype and bool(held.isfinite().all())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_low_rank_bound_holds(name: str, bits: int) -> None:
    """|y − ŷ| ≤ max|y|/254 for int8; float16 rounds by 2⁻¹¹, and saturates at 65504."""
    x, compressor = ACTIVATIONS[name], low_rank(rank=DIM, bits=bits)
    cache = one_layer_cache(compressor, compressor)
    cache.update(x, x, 0)
    held = cache.layers[0].keys
    assert bool(held.isfinite().all())
    u, mean = compressor.U.double(), compressor.mean.double()
    y, decoded = ((t.double() - mean) @ u for t in (x, held))
    largest = y.abs().amax(-1, keepdim=True)
    rounding = 1e-5 * (largest + float(mean.abs().max()))
    if bits == 8:
        assert bool(((y - decoded).abs() <= largest / 254 + rounding).all())
    else:
        fits = largest[..., 0] < 65000
        within = ((y - decoded).abs() <= largest * 2.0**-11 + 1e-7 + rounding).all(-1)
        assert bool((within | ~fits).all())


def _attended(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention in float64, [B, q, Hq, D]."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * scaling
    n_queries, n_tokens = scores.shape[2:]
    seen = torch.ones(n_queries, n_tokens, dtype=torch.bool).tril(n_tokens - n_queries)
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("n_queries", [1, 48], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_attention_from_the_blocks(name: str, n_queries: int) -> None:
    """What the codes stand for, attended in float64, to within the error of a score and of a sum."""
    scaling = 0.25
    for kinds in ((name, name), (name, "every scale"), ("heavy tails", name)):
        keys, values = (ACTIVATIONS[kind] for kind in kinds)
        for size in (1e-3, 1.0, 30.0):
            cache = one_layer_cache(_codec("key", 3.0), _codec("value", 3.0))
            cache.update(keys, values, 0)
            layer = cache.layers[0]
            queries = size * torch.randn(
                1, 2 * HEADS, n_queries, DIM, generator=torch.Generator().manual_seed(3)
            )
            out = handed_out(layer).attend(queries, mask=None, scaling=scaling)
            assert bool(out.isfinite().all()), kinds
            expected = _attended(queries, layer.keys, layer.values, scaling)
            # Scores are off by 10⁻³·‖q‖·‖k‖ at most, so that weights are by a factor.
            lengths = queries.double().norm(dim=-1).amax(), layer.keys.double().norm(dim=-1).amax()
            off = 1e-3 * scaling * float(lengths[0] * lengths[1])
            largest = float(layer.values.double().norm(dim=-1).amax())
            bound = (min(2.0, math.expm1(min(2 * off, 3.0))) + 1e-4) * largest
            assert float((out - expected).norm(dim=-1).amax()) <= bound + 1e-30, (kinds, size)


def _biased(scale: float) -> Any:
    """Qwen2 with key biases of that size in some channels, as the first layers of Qwen2.5 have them."""
    model = tiny("qwen2")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias
            channels = torch.randperm(len(bias), generator=generator)[:6]
            bias[channels] = scale * torch.randn(6, generator=generator)
    return model


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_key_biases_as_in_qwen(scale: float) -> None:
    """Means take up the biases, so that attention from the blocks sees how keys differ, not how floats round."""
    model = _biased(scale)
    preset = calibrate(
        model, [tokens(96, seed)[0] for seed in range(8)], options=CalibrationOptions(tail=16, block_len=8)
    ).with_bits(7.0)
    keys = {}

    def note(_: Any, args: Any, output: Tensor) -> None:
        keys["k"] = output

    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(note)
    outputs = {}
    with torch.no_grad():
        exact = model(tokens(120)).logits
        for kind in ("eager", "sdpa"):
            model.set_attn_implementation(kind)
            cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=8)
            parts = [model(part, past_key_values=cache).logits for part in tokens(120).split(20, dim=1)]
            outputs[kind] = torch.cat(parts, dim=1)
    hook.remove()
    assert float(keys["k"].abs().max()) > scale
    spread = float(exact.std())
    for kind, logits in outputs.items():
        assert bool(logits.isfinite().all()), kind
    # As far from the exact model as without biases, and the two paths together.
    apart = float((outputs["sdpa"] - outputs["eager"]).abs().mean()) / spread
    off = float((outputs["eager"] - exact).abs().mean()) / spread
    assert apart < 0.25 * off + 0.02, (apart, off)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e19])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_with_bad_numbers_can_be_taken_back(bad: float, attention: str, layer: int) -> None:
    """NaN and infinity are refused before they are held; crop(0) takes back what the pass did in other layers."""
    model = tiny("llama", attn_implementation=attention)
    cache, fresh = compressed_cache("llama"), compressed_cache("llama")
    projection = model.model.layers[layer].self_attn.v_proj
    with torch.no_grad():
        for each in (cache, fresh):
            # So many that three more fill no block: what a pass has coded stays coded.
            model(tokens(50), past_key_values=each)
        hook = projection.register_forward_hook(
            lambda _m, _a, out: out.index_fill(-1, torch.tensor([3]), bad)
        )
        with pytest.raises(NonFiniteError, match="value"):
            model(tokens(3, 1), past_key_values=cache)
        hook.remove()
        cache.crop(0)
        got, expected = (model(tokens(4, 2), past_key_values=each).logits for each in (cache, fresh))
    assert torch.equal(got, expected)
