"""Lazy keys and values: models decode straight from the blocks, and write what they do with expanded tokens."""

from __future__ import annotations

import copy
import itertools
import os
import select
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from cache_helpers import expanded, handed_out, served
from kvlathe import CalibrationOptions, CompressedDynamicCache, Preset, calibrate
from kvlathe.cache.layer import CompressedLayer
from kvlathe.stores.native import NativeStore
from tiny_models import VOCAB, tiny

MODELS = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "glm", "cohere",
    "smollm3", "stablelm", "gpt_oss",
]  # fmt: skip
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]
FLOAT32 = {"atol": 2e-3, "rtol": 2e-3}
HALF = {"atol": 0.1, "rtol": 0.05}
_PRESETS: dict[str, Preset] = {}


def preset_of(name: str, model: PreTrainedModel) -> Preset:
    if name not in _PRESETS:
        generator = torch.Generator().manual_seed(5)
        windows = [torch.randint(0, VOCAB, (96,), generator=generator) for _ in range(6)]
        options = CalibrationOptions(block_len=8, tail=16, n_sinks=2, cost_windows=0)
        calibration = calibrate(model, windows, options=options)
        _PRESETS[name] = calibration.with_bits(6.0)
    return _PRESETS[name]


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch + length))


@torch.no_grad()
def assert_as_expanded(
    model: PreTrainedModel,
    cache: CompressedDynamicCache,
    padding: int,
    steps: list[int],
    tolerance: dict[str, float],
) -> None:
    """Behind a prompt of 54 tokens, every step gives the logits that it gives with ordinary, expanded keys and values.

    Both begin from the same packed tokens: a copy of the cache goes the expanded way, one step far.
    """
    ids = prompt(2, 54 + sum(steps))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache.note_padding(mask)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def logits(cache: CompressedDynamicCache, start: int, end: int) -> torch.Tensor:
        return model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        ).logits

    logits(cache, 0, 54)
    ends = list(itertools.accumulate(steps, initial=54))
    for start, end in itertools.pairwise(ends):
        with expanded():
            expected = logits(copy.deepcopy(cache), start, end)
        with served(model):
            got = logits(cache, start, end)
        torch.testing.assert_close(got, expected, **tolerance)
    assert cache.get_memory_stats()["compressed_tokens"] > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("steps", [[1, 1, 3, 1], [30, 1, 24]], ids=["short", "long"])
def test_logits_are_those_of_the_expanded_path(name: str, padding: int, steps: list[int]) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), uncompressed_tail=8)
    assert_as_expanded(model, cache, padding, steps, FLOAT32)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("steps", [[1] * 12, [5, 3, 1, 9, 1], [30, 1, 24, 60]], ids=["one", "short", "long"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_windows_that_forget_give_the_logits_of_the_expanded_path(
    name: str, padding: int, steps: list[int]
) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), model=model, uncompressed_tail=8)
    assert_as_expanded(model, cache, padding, steps, FLOAT32)
    windows = [layer for layer in cache.layers if isinstance(layer, CompressedLayer) and layer.is_sliding]
    assert windows
    for layer in windows:
        # Something was forgotten, and something is coded.
        assert layer._store.first > 0 and layer.n_coded > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [[1, 1, 3, 1], [30, 1, 24]], ids=["short", "long"])
def test_half_precision_models(dtype: torch.dtype, steps: list[int]) -> None:
    preset = preset_of("llama", tiny("llama"))
    model = tiny("llama").to(dtype)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
    # Both round all else to the model's format; ours does not round the decoded keys and values.
    assert_as_expanded(model, cache, 0, steps, HALF)


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}]
)
def test_generate(kwargs: dict[str, int]) -> None:
    model = tiny("llama")
    preset = preset_of("llama", model)
    ids = prompt(1, 50)
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **kwargs}
    lazy, dense = (CompressedDynamicCache.from_preset(preset, uncompressed_tail=8) for _ in range(2))
    with expanded():
        expected = model.generate(input_ids=ids, past_key_values=dense, **common)
    got = model.generate(input_ids=ids, past_key_values=lazy, **common)
    assert torch.equal(got, expected)
    assert lazy.get_memory_stats()["expanded_layers"] == 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_nothing_is_expanded_while_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), model=model, uncompressed_tail=8)
    with torch.no_grad():
        model(input_ids=prompt(1, 50), past_key_values=cache, use_cache=True)
        monkeypatch.setattr(
            "kvlathe.stores.native.NativeStore.read", lambda *_, **__: pytest.fail("expanded")
        )
        for _ in range(20):
            model(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 70


def test_a_chunk_without_padding_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    masks = []
    attend = NativeStore.attend
    monkeypatch.setattr(
        NativeStore,
        "attend",
        lambda *args, **kwargs: masks.append(kwargs["mask"]) or attend(*args, **kwargs),
    )
    with torch.no_grad():
        for n in (40, 30, 1):
            model(input_ids=prompt(1, n), past_key_values=cache)
    assert len(masks) == 2 * model.config.num_hidden_layers and masks.count(None) == len(masks)


def test_gradients_of_the_newest_tokens_survive() -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    with torch.no_grad():
        model(input_ids=prompt(1, 50), past_key_values=cache, use_cache=True)
    model(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True).logits.sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_assisted_decoding_still_packs_its_tail() -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    model.generate(
        input_ids=prompt(1, 50),
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        prompt_lookup_num_tokens=3,
    )
    # A tail of 8, a block of 8, and at most one round of candidates that might have been rolled back.
    assert cache.get_memory_stats()["uncompressed_tokens"] <= 2 + 8 + 8 + 4


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_chunked_prefill_expands_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), model=model, uncompressed_tail=8)
    monkeypatch.setattr("kvlathe.stores.native.NativeStore.read", lambda *_, **__: pytest.fail("expanded"))
    model.generate(
        input_ids=prompt(1, 90),
        past_key_values=cache,
        max_new_tokens=3,
        pad_token_id=0,
        prefill_chunk_size=30,
    )
    assert cache.get_seq_length() == 92


def test_two_threads_generate_at_once() -> None:
    model = tiny("llama")
    preset = preset_of("llama", model)

    def generate(seed: int) -> torch.Tensor:
        cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
        return model.generate(
            input_ids=prompt(1, 60 + seed),
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )

    alone = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_attention_works_in_a_forked_child() -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    # Wide enough to be worth several threads.
    keys = torch.randn(1, *cache_shape(model, 4000))
    cache.update(keys, keys, 0)
    queries = torch.randn(1, model.config.num_attention_heads, 1, keys.shape[-1])
    expected = handed_out(cache.layers[0]).attend(queries, mask=None, scaling=0.3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got = handed_out(cache.layers[0]).attend(queries, mask=None, scaling=0.3)
            os.write(writer, b"y" if torch.equal(got, expected) else b"n")
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 60)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready and os.read(reader, 1) == b"y"


def cache_shape(model: PreTrainedModel, n_tokens: int) -> tuple[int, int, int]:
    config = model.config
    return config.num_key_value_heads, n_tokens, config.hidden_size // config.num_attention_heads
