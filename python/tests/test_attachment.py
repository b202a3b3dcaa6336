"""`attach`: decoding straight from the blocks gives what expanded attention gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvlathe import CalibrationOptions, CompressedDynamicCache, Preset, attach, calibrate, detach
from kvlathe.attachment import ATTENTION_NAME
from kvlathe.errors import ModelError
from tiny_models import VOCAB, tiny

MODELS = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "glm", "cohere",
    "smollm3", "stablelm", "gpt_oss",
]  # fmt: skip
_PRESETS: dict[str, Preset] = {}


def preset_of(name: str, model: PreTrainedModel) -> Preset:
    if name not in _PRESETS:
        generator = torch.Generator().manual_seed(5)
        windows = [torch.randint(0, VOCAB, (96,), generator=generator) for _ in range(6)]
        calibration = calibrate(model, windows, options=CalibrationOptions(block_len=8, tail=16, n_sinks=2))
        _PRESETS[name] = calibration.with_bits(6.0)
    return _PRESETS[name]


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch + length))


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, preset: Preset, ids: torch.Tensor, mask: torch.Tensor, steps: list[int]
) -> list[torch.Tensor]:
    """Logits of a prefill and of the following steps of the given lengths."""
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
    at = ids.shape[1] - sum(steps)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    outputs = []
    for start, end in [(0, at)] + [
        (at + sum(steps[:i]), at + sum(steps[: i + 1])) for i in range(len(steps))
    ]:
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        outputs.append(out.logits)
    assert cache.get_memory_stats()["compressed_tokens"] > 0
    return outputs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 5])
def test_logits_are_those_of_the_expanded_path(name: str, padding: int) -> None:
    model = tiny(name)
    preset = preset_of(name, model)
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    steps = [1, 1, 3, 1]
    expected = logits_of(model, preset, ids, mask, steps)
    before = model.config._attn_implementation
    attach(model)
    try:
        assert model.config._attn_implementation == ATTENTION_NAME
        got = logits_of(model, preset, ids, mask, steps)
    finally:
        detach(model)
    assert model.config._attn_implementation == before
    for a, b in zip(got, expected, strict=True):
        # The padded row's own padding positions are nobody's business.
        keep = slice(padding, None) if a.shape[1] > padding else slice(None)
        torch.testing.assert_close(a[:, keep], b[:, keep], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 16}]
)
def test_generate(kwargs: dict[str, int]) -> None:
    model = tiny("llama")
    preset = preset_of("llama", model)
    ids = prompt(1, 50)
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **kwargs}
    expected = model.generate(
        input_ids=ids,
        past_key_values=CompressedDynamicCache.from_preset(preset, uncompressed_tail=8),
        **common,
    )
    attach(attach(model))
    try:
        cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
        got = model.generate(input_ids=ids, past_key_values=cache, **common)
        stock = model.generate(input_ids=ids, past_key_values=DynamicCache(), **common)
    finally:
        detach(detach(model))
    assert torch.equal(got, expected)
    assert torch.equal(stock, model.generate(input_ids=ids, past_key_values=DynamicCache(), **common))


def test_nothing_is_expanded_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    attach(model)
    try:
        with torch.no_grad():
            model(input_ids=prompt(1, 50), past_key_values=cache, use_cache=True)
            monkeypatch.setattr("kvlathe.stores.NativeStore.read", lambda *_: pytest.fail("expanded"))
            for _ in range(20):
                model(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True)
    finally:
        detach(model)
    assert cache.get_seq_length() == 70


def test_gradients_of_the_newest_tokens_survive() -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    attach(model)
    try:
        with torch.no_grad():
            model(input_ids=prompt(1, 50), past_key_values=cache, use_cache=True)
        model(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True).logits.sum().backward()
    finally:
        detach(model)
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ModelError, match="gpt2"):
        attach(tiny("gpt2"))


def test_assisted_decoding_still_packs_its_tail() -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    attach(model)
    try:
        model.generate(
            input_ids=prompt(1, 50),
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
            prompt_lookup_num_tokens=3,
        )
    finally:
        detach(model)
    # A tail of 8, a block of 8, and at most one round of candidates that might have been rolled back.
    assert cache.get_memory_stats()["uncompressed_tokens"] <= 2 + 8 + 8 + 4
