"""The seed's API reference, row by row: import paths, parameters, defaults, methods and the preset file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import gpt2.compression.compressed_cache as seed_module
import kvlathe
from cache_helpers import (
    identity_cache,
    low_rank,
    model_of,
    orthonormal,
    preset_of,
    random_kv,
    seed_preset,
    tokens,
    write_json,
)
from kvlathe import (
    CompressedDynamicCache,
    IdentityCompressor,
    QuantizedCalibratedCompressor,
    load_preset_cache,
)
from kvlathe.errors import DeviceError, KvlatheError, PresetError, ShapeError

SEED_NAMES = (
    "CompressedDynamicCache",
    "IdentityCompressor",
    "QuantizedCalibratedCompressor",
    "load_preset_cache",
)
REQUIRED = inspect.Parameter.empty


def _parameters(function: Any) -> dict[str, Any]:
    return {
        name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


@pytest.fixture
def tiny_preset(tmp_path: Path) -> str:
    """A hand-made seed preset that fits the tiny llama (2 layers, head_dim 16)."""
    return write_json(tmp_path / "preset.json", seed_preset(2, 4, 16, 12))


@pytest.mark.parametrize("name", SEED_NAMES)
def test_both_import_paths_give_the_same_object(name: str) -> None:
    assert getattr(seed_module, name) is getattr(kvlathe, name)
    assert name in seed_module.__all__


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            CompressedDynamicCache,
            {
                "k_compressors": REQUIRED,
                "v_compressors": REQUIRED,
                "num_layers": REQUIRED,
                "compress_start_len": 0,
                "uncompressed_tail": 0,
            },
        ),
        (
            load_preset_cache,
            {
                "preset_path": REQUIRED,
                "num_layers": REQUIRED,
                "device": "cuda",
                "adaptive": False,
                "compress_after": 512,
                "keep_recent": 256,
            },
        ),
        (IdentityCompressor, {}),
        (
            QuantizedCalibratedCompressor,
            {"U": REQUIRED, "mean": REQUIRED, "bits": 8, "dtype": torch.float16},
        ),
    ],
    ids=SEED_NAMES[:1] + SEED_NAMES[3:] + SEED_NAMES[1:3],
)
def test_parameters_and_defaults(function: Any, expected: dict[str, Any]) -> None:
    """The seed's, in its order; what we add can only be named, and never has to be."""
    parameters = _parameters(function)
    ours = {"config": None} if "num_layers" in expected else {}
    assert parameters == {**expected, **ours}
    assert list(parameters) == [*expected, *ours]
    for name in ours:
        assert inspect.signature(function).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_everything_can_be_passed_by_position_and_by_name(tiny_preset: str) -> None:
    compressors = [IdentityCompressor()] * 2
    by_position = CompressedDynamicCache(compressors, [low_rank()] * 2, 2, 5, 6)
    by_name = CompressedDynamicCache(
        k_compressors=compressors,
        v_compressors=[low_rank()] * 2,
        num_layers=2,
        compress_start_len=5,
        uncompressed_tail=6,
    )
    for cache in (by_position, by_name, load_preset_cache(tiny_preset, 2, "cpu", True, 5, 6)):
        assert (cache.compress_start_len, cache.uncompressed_tail, len(cache.layers)) == (5, 6, 2)


def test_lists_and_module_lists_are_taken() -> None:
    modules = torch.nn.ModuleList([low_rank(), low_rank()])
    cache = CompressedDynamicCache(torch.nn.ModuleList([IdentityCompressor()] * 2), modules, 2)
    cache.update(*random_kv(3), 0)
    assert cache.get_seq_length() == 3


def test_the_cache_is_a_dynamic_cache() -> None:
    cache = identity_cache(model_of("llama"))
    assert isinstance(cache, DynamicCache)
    assert len(cache) == 2
    assert cache.get_seq_length() == 0


def test_compressors_are_modules() -> None:
    for compressor in (IdentityCompressor(), low_rank()):
        assert isinstance(compressor, torch.nn.Module)


def test_identity_compressor_passes_through() -> None:
    x, _ = random_kv(4)
    compressor = IdentityCompressor()
    assert torch.equal(compressor.expand(compressor.compress(x)), x)
    assert torch.equal(compressor(x), x)


def test_quantized_compressor_takes_the_documented_call() -> None:
    compressor = QuantizedCalibratedCompressor(
        U=orthonormal(16, 12), mean=torch.zeros(16), bits=8, dtype=torch.float16
    )
    x, _ = random_kv(5)
    coded = compressor.compress(x)
    assert coded.dtype == torch.uint8
    assert coded.shape == (1, 2, 5, 12 + 4)
    assert compressor.expand(coded).dtype == torch.float16
    assert (compressor.head_dim, compressor.rank) == (16, 12)


def test_reset_clears_for_a_new_sequence(tiny_preset: str) -> None:
    model = model_of("llama")
    cache = load_preset_cache(tiny_preset, 2, device="cpu")
    first = model.generate(tokens(20), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == 25
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.get_memory_stats()["total_bytes"] == 0
    again = model.generate(tokens(20), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(first, again)
    cache.reset()
    # Another batch size is fine after a reset.
    assert model.generate(tokens(9, batch=3), past_key_values=cache, max_new_tokens=2).shape[0] == 3


def test_memory_stats_keys(tiny_preset: str) -> None:
    cache = load_preset_cache(tiny_preset, 2, device="cpu")
    expected = {
        "total_bytes": int,
        "total_mb": float,
        "exact_bytes": int,
        "coded_bytes": int,
        "imported_bytes": int,
        "stock_bytes": int,
        "num_layers": int,
        "window_layers": int,
        "stock_layers": int,
        "expanded_layers": int,
        "seq_len": int,
        "compressed_tokens": int,
        "uncompressed_tokens": int,
        "compress_start_len": int,
        "uncompressed_tail": int,
        "uncompressed_bytes_equivalent": int,
        "compression_ratio": float,
        "bits_per_value": float,
    }
    for n_tokens in (0, 7):
        if n_tokens:
            for layer in range(2):
                cache.update(*random_kv(n_tokens), layer)
        stats = cache.get_memory_stats()
        assert {key: type(value) for key, value in stats.items()} == expected
        assert stats["seq_len"] == n_tokens == stats["compressed_tokens"] + stats["uncompressed_tokens"]
        assert stats["total_bytes"] == stats["exact_bytes"] + stats["coded_bytes"]
    json.dumps(stats)


def test_a_hand_made_seed_preset_compresses_values_only(tiny_preset: str) -> None:
    model = model_of("llama")
    cache = load_preset_cache(preset_path=tiny_preset, num_layers=2, device="cpu")
    out = model.generate(tokens(30), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 38)
    reference = DynamicCache()
    model(out[:, :-1], past_key_values=reference)
    assert isinstance(cache.compressor(0, "key"), IdentityCompressor)
    assert isinstance(cache.compressor(0, "value"), QuantizedCalibratedCompressor)
    # In layer 0 nothing that was compressed lies upstream: keys are those of the stock cache, values are not.
    assert torch.allclose(cache.layers[0].keys, reference.layers[0].keys, atol=1e-5)
    compressor = cache.compressor(0, "value")
    expected = compressor.expand(compressor.compress(reference.layers[0].values), torch.float32)
    assert torch.allclose(cache.layers[0].values, expected, atol=1e-3)
    assert not torch.allclose(cache.layers[0].values, reference.layers[0].values, atol=1e-2)
    stats = cache.get_memory_stats()
    assert stats["compressed_tokens"] == 37


def test_a_seed_preset_of_full_rank_changes_little(tmp_path: Path) -> None:
    model = model_of("llama")
    path = write_json(tmp_path / "full.json", seed_preset(2, 4, 16, 16))
    ids = tokens(40)
    cache = load_preset_cache(path, 2, "cpu")
    with torch.no_grad():
        exact = model(ids).logits[:, -1]
        model(ids[:, :-1], past_key_values=cache)
        coded = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert float((exact - coded).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("missing", ["compression_ratio"])
def test_keys_that_a_reader_can_work_out_may_be_missing(tmp_path: Path, missing: str) -> None:
    content = seed_preset(2, 4, 16, 12)
    del content[missing]
    load_preset_cache(write_json(tmp_path / "p.json", content), 2, "cpu")


def test_a_layer_without_a_side_stays_exact(tmp_path: Path) -> None:
    content = seed_preset(2, 4, 16, 12)
    del content["layers"][1]["V"]
    cache = load_preset_cache(write_json(tmp_path / "p.json", content), 2, "cpu")
    assert isinstance(cache.compressor(0, "value"), QuantizedCalibratedCompressor)
    assert isinstance(cache.compressor(1, "value"), IdentityCompressor)


def test_our_json_has_the_seeds_keys(tmp_path: Path) -> None:
    preset = preset_of("llama", 4.0)
    path = tmp_path / "ours.json"
    preset.save(path)
    content = json.loads(path.read_text())
    assert {"model", "rank", "head_dim", "n_layers", "n_heads", "compression_ratio", "layers"} <= set(content)
    assert (content["rank"], content["head_dim"], content["n_layers"], content["n_heads"]) == (12, 16, 2, 4)
    assert len(content["layers"]) == 2
    for layer in content["layers"]:
        for side in ("K", "V"):
            u = torch.tensor(layer[side]["U"], dtype=torch.float64)
            mean = torch.tensor(layer[side]["mean"])
            assert u.shape == (16, 12)
            assert mean.shape == (16,)
            assert float((u.T @ u - torch.eye(12)).abs().max()) <= 1e-3
            # What a reader of the seed's kind does with it.
            QuantizedCalibratedCompressor(u, mean)
    cache = load_preset_cache(str(path), 2, "cpu")
    out = model_of("llama").generate(tokens(40), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44)
    assert cache.get_memory_stats()["compressed_tokens"] == 36  # of 43 tokens; 4 sinks, blocks of 8


def test_a_seed_reader_can_use_our_json(tmp_path: Path) -> None:
    """Our JSON without our own part is a seed preset."""
    path = tmp_path / "ours.json"
    preset_of("llama", 4.0).save(path)
    content = json.loads(path.read_text())
    del content["kvlathe"]
    cache = load_preset_cache(write_json(tmp_path / "seed.json", content), 2, "cpu")
    assert isinstance(cache.compressor(0, "value"), QuantizedCalibratedCompressor)
    assert isinstance(cache.compressor(0, "key"), IdentityCompressor)


@pytest.mark.parametrize("extension", ["json", "safetensors"])
def test_both_formats_give_the_same_cache(tmp_path: Path, extension: str) -> None:
    preset = preset_of("llama", 4.0)
    path = tmp_path / f"p.{extension}"
    preset.save(path)
    cache = load_preset_cache(path, 2, "cpu")
    expected = CompressedDynamicCache.from_preset(preset, uncompressed_tail=0)
    for each in (cache, expected):
        each.update(*random_kv(40), 0)
    assert torch.equal(cache.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(cache.layers[0].values, expected.layers[0].values)


def _coded_after(cache: CompressedDynamicCache, n_tokens: int, step: int = 1) -> int:
    keys, values = random_kv(n_tokens)
    for at in range(0, n_tokens, step):
        cache.update(keys[:, :, at : at + step], values[:, :, at : at + step], 0)
    return int(cache.get_memory_stats()["compressed_tokens"])


def test_without_adaptive_everything_is_coded(tiny_preset: str) -> None:
    cache = load_preset_cache(tiny_preset, 2, "cpu", adaptive=False, compress_after=20, keep_recent=10)
    assert (cache.compress_start_len, cache.uncompressed_tail) == (0, 0)
    assert _coded_after(cache, 6) == 6


@pytest.mark.parametrize("step", [1, 7, 60])
def test_adaptive_waits_and_keeps_recent_tokens(tiny_preset: str, step: int) -> None:
    def coded(n_tokens: int) -> int:
        cache = load_preset_cache(tiny_preset, 2, "cpu", adaptive=True, compress_after=20, keep_recent=10)
        return _coded_after(cache, n_tokens, step)

    assert coded(20) == 0  # "after" 20 tokens: 20 are not enough
    assert coded(21) == 11
    assert coded(60) == 50


def test_adaptive_keeps_recent_tokens_bit_for_bit(tiny_preset: str) -> None:
    cache = load_preset_cache(tiny_preset, 2, "cpu", adaptive=True, compress_after=20, keep_recent=10)
    keys, values = random_kv(60)
    cache.update(keys, values, 0)
    held = cache.layers[0].values
    assert torch.equal(held[:, :, -10:], values[:, :, -10:])
    assert not torch.equal(held[:, :, :50], values[:, :, :50])


def test_adaptive_with_our_preset_keeps_whole_blocks(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    preset_of("llama", 4.0).save(path)
    cache = load_preset_cache(path, 2, "cpu", adaptive=True, compress_after=20, keep_recent=10)
    assert _coded_after(cache, 60) == (60 - 10) // 8 * 8 - 4
    assert cache.n_sinks() == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_default_device_without_cuda_says_what_to_do(tiny_preset: str) -> None:
    with pytest.raises(DeviceError, match='device="cpu"') as caught:
        load_preset_cache(tiny_preset, 2)
    assert 'device="cuda"' in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:-3"])
def test_a_device_that_does_not_exist(tiny_preset: str, device: str) -> None:
    with pytest.raises(DeviceError, match='device="cpu"'):
        load_preset_cache(tiny_preset, 2, device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_may_be_names_or_objects(tiny_preset: str, device: Any) -> None:
    assert load_preset_cache(tiny_preset, 2, device).get_seq_length() == 0


@pytest.mark.parametrize(("n_keys", "n_values"), [(1, 2), (2, 1), (3, 2), (2, 3), (0, 0)])
def test_lists_must_have_one_entry_a_layer(n_keys: int, n_values: int) -> None:
    with pytest.raises(ShapeError, match=r"num_layers=2") as caught:
        CompressedDynamicCache([IdentityCompressor()] * n_keys, [IdentityCompressor()] * n_values, 2)
    assert isinstance(caught.value, KvlatheError)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_presets_must_have_the_models_layers(tiny_preset: str, num_layers: int) -> None:
    with pytest.raises(PresetError, match=f"2 layers, the model has {num_layers}"):
        load_preset_cache(tiny_preset, num_layers, "cpu")
