"""Calibrated presets of tiny models, caches and random tensors for the cache's tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvlathe import (
    CalibrationOptions,
    CompressedDynamicCache,
    IdentityCompressor,
    Preset,
    QuantizedCalibratedCompressor,
    StreamSetCompressor,
    calibrate,
)
from kvlathe._native import Preset as NativePreset
from kvlathe.attachment import attach, can_attach, detach
from kvlathe.cache.expansions import Expansions
from kvlathe.cache.handout import Handout
from kvlathe.cache.layer import CompressedLayer
from kvlathe.preset import Side
from tiny_models import VOCAB, tiny

TAIL = 16


def tokens(n_tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Random token ids [batch, n_tokens] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, n_tokens), generator=generator)


@functools.cache
def model_of(name: str, **overrides: Any) -> PreTrainedModel:
    """The tiny model of that name, built once."""
    return tiny(name, **overrides)


@functools.cache
def _calibrated(name: str, block_len: int, overrides: tuple[tuple[str, Any], ...]) -> Preset:
    windows = [tokens(96, seed)[0] for seed in range(8)]
    # What a layer costs does not matter to a cache.
    options = CalibrationOptions(cost_windows=0, tail=TAIL, block_len=block_len)
    return calibrate(model_of(name, **dict(overrides)), windows, name=f"tiny {name}", options=options)


@functools.cache
def preset_of(name: str, bits: float = 6.0, block_len: int = 8, **overrides: Any) -> Preset:
    """A calibrated preset of a tiny model; ``bits`` without the side information."""
    preset = _calibrated(name, block_len, tuple(sorted(overrides.items())))
    return preset.with_bits(bits + preset.side_bits_per_value)


def stream_compressor(
    name: str = "llama",
    bits: float = 6.0,
    block_len: int = 8,
    layer: int = 0,
    side: Side = "key",
    **overrides: Any,
) -> StreamSetCompressor:
    """One side's calibrated codec."""
    preset = preset_of(name, bits, block_len, **overrides)
    return StreamSetCompressor(preset.codec(layer, side), preset.n_sinks)


def hand_made_preset(
    widths: list[int],
    *,
    mean: Tensor | None = None,
    basis: Tensor | None = None,
    inv_freq: tuple[float, ...] = (),
    block_len: int = 8,
    n_heads: int = 1,
    n_sinks: int = 0,
) -> Preset:
    """A preset of one layer, its KV heads alike; with no mean and no basis, coefficients are the components."""
    d = len(widths)
    identity = torch.eye(d)
    stream = {
        "mean": (torch.zeros(d) if mean is None else mean).tolist(),
        "basis": (identity if basis is None else basis).tolist(),
        "importance": [1.0] * d,
        "widths": widths,
    }
    side = {"U": identity.tolist(), "mean": [0.0] * d, "streams": [stream] * n_heads}
    rope = {"pairing": "half_split", "rotary_dim": 2 * len(inv_freq), "inv_freq": inv_freq}
    lathe = {
        "format_version": 2,
        "n_kv_heads": n_heads,
        "block_len": block_len,
        "n_sinks": n_sinks,
        "bits_per_value": 0.0,
        "rope": [rope] if inv_freq else [],
    }
    content = {
        "model": "made by hand",
        "rank": d,
        "head_dim": d,
        "n_layers": 1,
        "n_heads": n_heads,
        "kvlathe": lathe,
    }
    content["layers"] = [{"rope": 0 if inv_freq else None, "K": side, "V": side}]
    return Preset(NativePreset.from_bytes(json.dumps(content).encode()))


def hand_made_compressor(widths: list[int], **parts: Any) -> StreamSetCompressor:
    """The codec of the keys of `hand_made_preset`."""
    return StreamSetCompressor(hand_made_preset(widths, **parts).codec(0, "key"), 0)


def identity_cache(model: PreTrainedModel) -> CompressedDynamicCache:
    """A cache that compresses nothing, made for this model."""
    n = len(DynamicCache(config=model.config).layers)
    sides = [[IdentityCompressor()] * n for _ in range(2)]
    return CompressedDynamicCache(*sides, num_layers=n, config=model.config)


def compressed_cache(
    name: str, bits: float = 6.0, tail: int = TAIL, start: int = 0, **overrides: Any
) -> CompressedDynamicCache:
    """A calibrated cache for a tiny model."""
    return CompressedDynamicCache.from_preset(
        preset_of(name, bits, **overrides),
        model=model_of(name, **overrides),
        uncompressed_tail=tail,
        compress_start_len=start,
    )


def one_layer_cache(
    key: nn.Module, value: nn.Module, *, start: int = 0, tail: int = 0
) -> CompressedDynamicCache:
    """A cache of one layer."""
    return CompressedDynamicCache([key], [value], 1, compress_start_len=start, uncompressed_tail=tail)


@contextmanager
def expanded() -> Iterator[None]:
    """Meanwhile caches hand out ordinary tensors, so that models attend to expanded tokens by themselves."""
    hand_out = CompressedLayer.hand_out
    CompressedLayer.hand_out = lambda self, keys, values, *_: self.update(keys, values)
    try:
        yield
    finally:
        CompressedLayer.hand_out = hand_out


@contextmanager
def served(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as its users have it: attached, where attention is eager."""
    attaches = can_attach(model)
    if attaches:
        attach(model)
    try:
        yield model
    finally:
        if attaches:
            detach(model)


def handed_out(layer: CompressedLayer, n_new: int = 1) -> Handout:
    """What a layer would hand out, its last ``n_new`` tokens being those of an update."""
    return Handout(layer, layer.store, n_new, None, Expansions(), 0)


def orthonormal(head_dim: int, rank: int, seed: int = 0) -> Tensor:
    """[head_dim, rank] with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(head_dim, rank, generator=generator, dtype=torch.float64)).Q.float()


def low_rank(
    head_dim: int = 16, rank: int = 12, bits: int = 8, seed: int = 0
) -> QuantizedCalibratedCompressor:
    """The seed's compressor with a random basis and mean."""
    generator = torch.Generator().manual_seed(seed + 1)
    return QuantizedCalibratedCompressor(
        orthonormal(head_dim, rank, seed), torch.randn(head_dim, generator=generator), bits=bits
    )


def random_kv(
    n_tokens: int,
    *,
    batch: int = 1,
    heads: int = 2,
    dim: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Random keys and values [batch, heads, n_tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, heads, n_tokens, dim, generator=generator) for _ in range(2))
    return keys.to(dtype), values.to(dtype)


def seed_preset(
    n_layers: int, n_heads: int, head_dim: int, rank: int, *, sides: tuple[str, ...] = ("K", "V")
) -> dict[str, Any]:
    """A preset in the seed's form, made by hand."""
    generator = torch.Generator().manual_seed(7)
    layers = [
        {
            side: {
                "U": orthonormal(head_dim, rank, seed=2 * layer + at).tolist(),
                "mean": (0.1 * torch.randn(head_dim, generator=generator)).tolist(),
            }
            for at, side in enumerate(sides)
        }
        for layer in range(n_layers)
    ]
    return {
        "model": "tests/tiny",
        "rank": rank,
        "head_dim": head_dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "compression_ratio": round(16 * head_dim / (8 * rank), 2),
        "layers": layers,
    }


def write_json(path: Path, content: Any) -> str:
    """Write JSON and return the path as the seed API takes it."""
    path.write_text(json.dumps(content))
    return str(path)
