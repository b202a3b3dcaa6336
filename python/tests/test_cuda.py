"""Caches and calibration on a GPU against the same on the CPU; skipped where torch finds no GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from cache_helpers import TAIL, compressed_cache, expanded, model_of, preset_of, stream_compressor, tokens
from kvlathe import CompressedDynamicCache, DeviceError, Preset, calibrate
from kvlathe.calibration import CalibrationOptions
from kvlathe.preset import Side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ("llama", "qwen2", "gpt2")


def _on_gpu(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    # A copy: models of the helpers are shared between tests.
    return copy.deepcopy(model_of(name)).to("cuda", dtype)


def _logits(
    model: PreTrainedModel, cache: DynamicCache, n_tokens: int = 150, chunk: int = 50
) -> torch.Tensor:
    ids = tokens(n_tokens, batch=2).to(model.device)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    return torch.cat(parts, dim=1).float().cpu()


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_blocks_coded_on_either_device_are_read_on_the_other(side: Side, bits: float) -> None:
    compressor = stream_compressor("llama", bits, side=side)
    x = torch.randn(2, compressor.native.n_heads, 1024, compressor.native.head_dim)
    on_cpu, on_gpu = compressor.compress(x, 4), compressor.compress(x.cuda(), 4)
    assert on_gpu.device.type == "cuda"
    # Sums in another order may move a code that lies on a border.
    assert float((on_cpu != on_gpu.cpu()).double().mean()) < 0.005
    for packed in (on_cpu, on_gpu.cpu()):
        decoded = compressor.expand(packed.cuda(), 4)
        assert decoded.device.type == "cuda"
        torch.testing.assert_close(decoded.cpu(), compressor.expand(packed, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_cpu(name: str) -> None:
    on_cpu, on_gpu = model_of(name), _on_gpu(name)
    expected = _logits(on_cpu, compressed_cache(name))
    got = _logits(on_gpu, compressed_cache(name))
    assert float((got - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("n_beams", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_generate_with_and_without_lazy_keys(dtype: torch.dtype, n_beams: int) -> None:
    model, prompt = _on_gpu("llama", dtype), tokens(60, batch=2).cuda()
    asked = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "num_beams": n_beams}
    plain, cache = (compressed_cache("llama") for _ in range(2))
    with expanded():
        expected = model.generate(prompt, past_key_values=plain, **asked)
    got = model.generate(prompt, past_key_values=cache, **asked)
    assert expected.shape == got.shape == (2, 90)
    # No native attention there: the same dense one.
    assert torch.equal(got, expected)
    assert cache.get_memory_stats()["compressed_tokens"] > 0


def test_a_copy_and_a_crop_leave_what_was_there() -> None:
    model = _on_gpu("llama")
    cache = compressed_cache("llama")
    _logits(model, cache)
    twin, more = copy.deepcopy(cache), tokens(3, seed=1, batch=2).cuda()
    with torch.no_grad():
        expected = model(input_ids=more, past_key_values=cache).logits
        assert cache.get_seq_length() == 153
        assert torch.equal(model(input_ids=more, past_key_values=twin).logits, expected)
    cache.crop(-20)
    assert cache.get_seq_length() == 133


@pytest.mark.parametrize("way", ["to the CPU", "to the GPU"])
def test_a_saved_cache_goes_on_where_it_is_loaded_to(way: str, tmp_path: Path) -> None:
    models = [model_of("llama"), _on_gpu("llama")]
    origin, target = models if way == "to the GPU" else models[::-1]
    device = origin.device.type
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), uncompressed_tail=TAIL, device=device)
    _logits(origin, cache)
    torch.save(cache, tmp_path / "cache.pt")
    twin = torch.load(tmp_path / "cache.pt", map_location=target.device)
    n_coded = cache.get_memory_stats()["compressed_tokens"]
    assert twin.get_memory_stats()["compressed_tokens"] == n_coded > 0
    expected, got = (_logits(model, each, 40) for model, each in ((origin, cache), (target, twin)))
    assert float((got - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_model_elsewhere_is_refused() -> None:
    cache = CompressedDynamicCache.from_preset(
        preset_of("llama"), model=model_of("llama"), device="cuda", uncompressed_tail=0
    )
    with pytest.raises(DeviceError, match="device='cpu'"):
        _logits(model_of("llama"), cache)


def test_calibration_is_that_of_the_cpu() -> None:
    windows = [tokens(96, seed=seed)[0] for seed in range(6)]
    options = CalibrationOptions(cost_windows=0, tail=TAIL, block_len=8)
    on_cpu, on_gpu = (
        calibrate(model, windows, options=options).with_bits(4.0)
        for model in (model_of("llama"), _on_gpu("llama"))
    )

    def error(preset: Preset) -> float:
        model = model_of("llama")
        cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=0)
        expected = _logits(model, DynamicCache())
        return float((_logits(model, cache) - expected).norm() / expected.norm())

    # Gradients and sums differ in their last bits, and with them here and there a width.
    assert error(on_gpu) == pytest.approx(error(on_cpu), rel=0.1)


def test_memory_of_the_gpu_falls() -> None:
    model, n_tokens = _on_gpu("llama"), 2000
    held = []
    for cache in (DynamicCache(), compressed_cache("llama")):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        _logits(model, cache, n_tokens, chunk=500)
        held.append(torch.cuda.memory_allocated() - before)
        if isinstance(cache, CompressedDynamicCache):
            stats = cache.get_memory_stats()
            assert held[-1] == pytest.approx(stats["total_bytes"], rel=0.05, abs=100_000)
        del cache
    stock_bytes, our_bytes = held
    assert our_bytes < stock_bytes / 2
