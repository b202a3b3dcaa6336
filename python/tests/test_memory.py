"""`get_memory_stats` against independent accounts: widths, tensors, and the process's resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cache_helpers import (
    compressed_cache,
    identity_cache,
    low_rank,
    model_of,
    one_layer_cache,
    preset_of,
    random_kv,
    stream_compressor,
    tokens,
)
from kvlathe import CompressedDynamicCache, IdentityCompressor, StreamSetCompressor

HEADS, DIM = 2, 16
_LINE = 64  # packed blocks are aligned to cache lines
_PER_BLOCK = 72  # its place in a list, what counts its users and frees it, at most


def _packed_block(preset: Any, layer: int, side: str) -> int:
    """Bytes of one block of all heads: two, one a token, half a one a coefficient, and the coefficients' widths."""
    n = preset.meta["kvlathe"]["block_len"]
    widths_of_heads = preset.native.widths(layer, side)
    return sum(2 + n + (len(widths) + 1) // 2 + n * sum(widths) // 8 for widths in widths_of_heads)


@pytest.mark.parametrize("bits", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("block_len", [8, 32])
def test_coded_bytes_are_what_the_widths_say(bits: float, block_len: int) -> None:
    preset = preset_of("llama", bits, block_len)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=20)
    batch, n_tokens = 3, 600
    for layer in range(2):
        cache.update(*random_kv(n_tokens, batch=batch), layer)
    stats = cache.get_memory_stats()
    n_blocks = (n_tokens - 20) // block_len
    assert stats["compressed_tokens"] == n_blocks * block_len - 4  # the sinks' places in the first block
    packed, at_most = 0, 0
    for layer in range(2):
        for side in ("key", "value"):
            block = _packed_block(preset, layer, side)
            packed += batch * n_blocks * block
            at_most += batch * n_blocks * (-(-block // _LINE) * _LINE + _PER_BLOCK)
    assert packed <= stats["coded_bytes"] <= at_most


def test_the_torch_store_takes_the_packed_bytes_and_no_more() -> None:
    class Plain(StreamSetCompressor):
        pass

    preset = preset_of("llama", 3.0)
    compressors = [Plain(preset.codec(0, side)) for side in ("key", "value")]  # type: ignore[arg-type]
    cache = one_layer_cache(*compressors, tail=20)
    cache.update(*random_kv(600, batch=3), 0)
    stats = cache.get_memory_stats()
    n_blocks = (600 - 20) // 8
    assert stats["coded_bytes"] == 3 * n_blocks * sum(_packed_block(preset, 0, s) for s in ("key", "value"))
    assert stats["exact_bytes"] == 3 * 2 * (600 + 4 - n_blocks * 8) * HEADS * DIM * 4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("step", [1, 600])
def test_low_rank_bytes(bits: int, step: int) -> None:
    cache = one_layer_cache(IdentityCompressor(), low_rank(rank=12, bits=bits))
    _feed_random(cache, 600, step)
    stats = cache.get_memory_stats()
    exact = 600 * HEADS * DIM * 4
    needed = 600 * HEADS * (12 + 4 if bits == 8 else 24)
    assert stats["compressed_tokens"] == 600
    # An eighth of headroom for growth, and a little constant room in each head's tail.
    assert needed <= stats["coded_bytes"] <= 1.13 * needed + 256
    assert exact <= stats["exact_bytes"] <= 1.13 * exact + HEADS * 256 * DIM * 4


def _feed_random(cache: CompressedDynamicCache, n_tokens: int, step: int, **kwargs: Any) -> None:
    keys, values = random_kv(n_tokens, **kwargs)
    for part in zip(keys.split(step, dim=2), values.split(step, dim=2), strict=True):
        cache.update(*part, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 7, 600])
def test_the_exact_part_is_sinks_and_tail(dtype: torch.dtype, step: int) -> None:
    cache = one_layer_cache(stream_compressor(side="key"), stream_compressor(side="value"), tail=100)
    _feed_random(cache, 600, step, dtype=dtype)
    stats = cache.get_memory_stats()
    n_exact = stats["uncompressed_tokens"]
    assert n_exact == 600 + 4 - (600 - 100) // 8 * 8
    per_token = 2 * HEADS * DIM * dtype.itemsize
    # What the tail may hold in reserve is bounded, however long the prompt was.
    slack = 2 * HEADS * 256 * DIM * dtype.itemsize
    assert n_exact * per_token <= stats["exact_bytes"] <= 2 * n_exact * per_token + slack


@pytest.mark.parametrize("step", [1, 7, 600])
def test_identity_takes_the_stock_caches_bytes(step: int) -> None:
    cache, stock = one_layer_cache(IdentityCompressor(), IdentityCompressor()), DynamicCache()
    _feed_random(cache, 600, step)
    stock.update(*random_kv(600), 0)
    layer = stock.layers[0]
    expected = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    stats = cache.get_memory_stats()
    assert stats["uncompressed_bytes_equivalent"] == expected
    assert expected <= stats["total_bytes"] <= 1.13 * expected + 2 * HEADS * DIM * 4
    assert stats["coded_bytes"] == stats["compressed_tokens"] == 0
    assert 0.88 <= stats["compression_ratio"] <= 1.0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_equivalent_is_what_the_stock_cache_takes(name: str) -> None:
    model = model_of(name)
    for cache in (compressed_cache(name), identity_cache(model)):
        stock = DynamicCache(config=model.config)
        for each in (cache, stock):
            model(tokens(70, batch=2), past_key_values=each)
        held = sum(t.numel() * t.element_size() for layer in stock.layers for t in (layer.keys, layer.values))
        stats = cache.get_memory_stats()
        assert stats["uncompressed_bytes_equivalent"] == held
        assert stats["compression_ratio"] == pytest.approx(held / stats["total_bytes"])
        assert stats["bits_per_value"] == pytest.approx(8 * stats["total_bytes"] / (held / 4))
        assert stats["total_mb"] == stats["total_bytes"] / 2**20


def test_a_long_sequence_approaches_the_presets_rate() -> None:
    preset = preset_of("llama", 3.0, 64)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=0)
    for layer in range(2):
        cache.update(*random_kv(20_000), layer)
    stats = cache.get_memory_stats()
    # Blocks of so small a model are padded by some percent.
    assert preset.bits_per_value <= stats["bits_per_value"] <= 1.2 * preset.bits_per_value


def test_beams_share_blocks() -> None:
    cache = one_layer_cache(stream_compressor(side="key"), stream_compressor(side="value"), tail=100)
    cache.update(*random_kv(600), 0)
    one = cache.get_memory_stats()
    cache.batch_repeat_interleave(4)
    four = cache.get_memory_stats()
    assert four["coded_bytes"] == one["coded_bytes"]
    assert four["exact_bytes"] >= 4 * one["uncompressed_tokens"] * 2 * HEADS * DIM * 4
    assert four["uncompressed_bytes_equivalent"] == 4 * one["uncompressed_bytes_equivalent"]
    # Going on, each beam has blocks of its own.
    cache.update(*random_kv(80, batch=4), 0)
    apart = cache.get_memory_stats()
    per_token = one["coded_bytes"] / (4 + one["compressed_tokens"])
    new_tokens = apart["compressed_tokens"] - one["compressed_tokens"]
    assert apart["coded_bytes"] == pytest.approx(one["coded_bytes"] + 4 * new_tokens * per_token, rel=1e-6)
    cache.reorder_cache(torch.tensor([1, 1, 1, 1]))
    assert cache.get_memory_stats()["coded_bytes"] == pytest.approx(
        one["coded_bytes"] + new_tokens * per_token, rel=1e-6
    )


@pytest.mark.parametrize("kind", ["streams", "low_rank", "identity"])
def test_memory_is_given_back(kind: str) -> None:
    compressors = {
        "streams": (stream_compressor(side="key"), stream_compressor(side="value")),
        "low_rank": (low_rank(), low_rank()),
        "identity": (IdentityCompressor(), IdentityCompressor()),
    }[kind]
    cache = one_layer_cache(*compressors)
    cache.update(*random_kv(600, batch=2), 0)
    before = cache.get_memory_stats()["total_bytes"]
    cache.crop(-300)
    if kind == "streams":
        assert cache.get_memory_stats()["coded_bytes"] <= 0.55 * before
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_memory_stats()["total_bytes"] <= 0.6 * before
    cache.reset()
    assert cache.get_memory_stats()["total_bytes"] == 0


# What the process really takes. A fresh one, so that nothing but the caches grows.

_MEASURE = """
import ctypes, gc, json, os, sys
import torch
from kvlathe import CompressedDynamicCache, IdentityCompressor, Preset
from kvlathe.preset_compressors import shared_compressor

torch.set_num_threads(1)
preset = Preset.load(sys.argv[1])
n_layers = preset.n_layers
generator = torch.Generator().manual_seed(0)


class Halves(torch.nn.Module):
    def compress(self, x):
        return x.half()

    def expand(self, coded):
        return coded.float()


def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


exact, user = [IdentityCompressor()] * n_layers, [Halves()] * n_layers
low_rank = [shared_compressor(preset, layer, "value") for layer in range(n_layers)]
make = {
    "streams": lambda: CompressedDynamicCache.from_preset(preset, uncompressed_tail=64),
    "low_rank": lambda: CompressedDynamicCache(low_rank, low_rank, n_layers),
    "user": lambda: CompressedDynamicCache(exact, user, n_layers),
    "identity": lambda: CompressedDynamicCache(exact, exact, n_layers),
}


def filled(kind, n_tokens, step):
    cache = make[kind]()
    for _ in range(n_tokens // step):
        for layer in range(n_layers):
            keys, values = (torch.randn(1, 2, step, 64, generator=generator) for _ in range(2))
            cache.update(keys, values, layer)
    return cache


kind, n_caches, n_tokens, step = json.loads(sys.argv[2])
# Starts threads and fills the allocator's small bins, but leaves no large holes for the caches to grow into.
filled(kind, 128, 128)
before = resident()
caches = [filled(kind, n_tokens, step) for _ in range(n_caches)]
after = resident()
stats = [cache.get_memory_stats() for cache in caches]
print(json.dumps([after - before, sum(s["total_bytes"] for s in stats)]))
"""

# (kind, how many caches, tokens in each, tokens a call): a prompt in one piece, and one in chunks.
_RUNS = [
    ("streams", 10, 10_000, 10_000),
    ("streams", 10, 10_000, 500),
    ("low_rank", 8, 4_000, 500),
    ("user", 3, 4_000, 4_000),
    ("identity", 3, 4_000, 4_000),
]


def measured(preset_path: Path, run: tuple[str, int, int, int]) -> tuple[int, int]:
    """Growth of resident memory, and what the caches say that they hold; in a process of its own."""
    command = [sys.executable, "-c", _MEASURE, str(preset_path), json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, held = json.loads(done.stdout)
    return grown, held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and trims glibc's heap")
@pytest.mark.parametrize("run", _RUNS, ids=[f"{kind}-{step}" for kind, _, _, step in _RUNS])
def test_resident_memory_agrees(tmp_path: Path, run: tuple[str, int, int, int]) -> None:
    path = tmp_path / "preset.safetensors"
    preset_of("llama", 4.0, 32, head_dim=64).save(path)
    resident, total_bytes = measured(path, run)
    assert total_bytes > 10e6  # large against the noise of a process
    assert resident == pytest.approx(total_bytes, rel=0.15), resident / total_bytes


def test_caches_of_a_preset_share_its_tables() -> None:
    preset = preset_of("llama", 3.0)
    first, second = (CompressedDynamicCache.from_preset(preset, uncompressed_tail=0) for _ in range(2))
    assert first.compressor(1, "key") is second.compressor(1, "key")
    assert first.compressor(1, "key") is not first.compressor(0, "key")
    other = CompressedDynamicCache.from_preset(preset_of("llama", 4.0), uncompressed_tail=0)
    assert other.compressor(1, "key") is not first.compressor(1, "key")


def _bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_expanded_tensors_are_not_kept() -> None:
    """`update` returns everything expanded; nothing of that may stay with the cache."""
    cache = one_layer_cache(stream_compressor(side="key"), stream_compressor(side="value"))
    cache.update(*random_kv(2000), 0)
    held = [value for value in vars(cache.layers[0]).values() if isinstance(value, Tensor)]
    assert _bytes_of(held) <= 4  # the one number that stubs are views of
