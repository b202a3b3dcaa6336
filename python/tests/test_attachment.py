"""`attach`: decoding straight from the blocks gives what expanded attention gives."""

from __future__ import annotations

import copy
import os
import select
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from cache_helpers import identity_cache
from kvlathe import CalibrationOptions, CompressedDynamicCache, Preset, attach, calibrate, detach
from kvlathe.attachment import ATTENTION_NAME
from kvlathe.cache.native_store import NativeStore
from kvlathe.cache.window import WindowLayer
from kvlathe.errors import ModelError
from tiny_models import VOCAB, tiny

MODELS = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "glm", "cohere",
    "smollm3", "stablelm", "gpt_oss",
]  # fmt: skip
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]
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
def logits_of(
    model: PreTrainedModel,
    preset: Preset,
    ids: torch.Tensor,
    mask: torch.Tensor,
    steps: list[int],
    cache: CompressedDynamicCache | None = None,
) -> list[torch.Tensor]:
    """Logits of a prefill and of the following steps of the given lengths."""
    if cache is None:
        cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
    cache.note_padding(mask)
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


def assert_as_expanded(got: list[torch.Tensor], expected: list[torch.Tensor], padding: int) -> None:
    """Logits of all steps, but for those of the padded row's own padding, which are nobody's business."""
    for a, b in zip(got, expected, strict=True):
        keep = slice(padding, None) if a.shape[1] > padding else slice(None)
        # Single codes of tokens that are packed later may round the other way: hence a bound for the mean as well.
        torch.testing.assert_close(a[:, keep], b[:, keep], atol=3e-2, rtol=2e-3)
        assert (a[:, keep] - b[:, keep]).abs().mean() < 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("steps", [[1, 1, 3, 1], [30, 1, 24]], ids=["short", "long"])
def test_logits_are_those_of_the_expanded_path(name: str, padding: int, steps: list[int]) -> None:
    model = tiny(name)
    preset = preset_of(name, model)
    ids = prompt(2, 54 + sum(steps))
    mask = torch.ones_like(ids)
    if padding and model.config._attn_implementation == "eager":
        # Eager attention hands padding other values than ours does, zeros. The tokens of a block share its drift and
        # the spacing of its gains, so here padding, which comes behind the sinks, fills a block.
        padding = preset.block_len
    mask[1, :padding] = 0
    expected = logits_of(model, preset, ids, mask, steps)
    before = model.config._attn_implementation
    attach(model)
    try:
        assert model.config._attn_implementation == ATTENTION_NAME
        got = logits_of(model, preset, ids, mask, steps)
    finally:
        detach(model)
    assert model.config._attn_implementation == before
    assert_as_expanded(got, expected, padding)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("steps", [[1] * 12, [5, 3, 1, 9, 1], [30, 1, 24, 60]], ids=["one", "short", "long"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_windows_that_forget_give_the_logits_of_the_expanded_path(
    name: str, padding: int, steps: list[int]
) -> None:
    model = tiny(name)
    preset = preset_of(name, model)
    ids = prompt(2, 54 + sum(steps))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0

    def logits() -> list[torch.Tensor]:
        cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=8)
        found = logits_of(model, preset, ids, mask, steps, cache)
        windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        assert windows
        for layer in windows:
            # Something was forgotten, and something is coded.
            assert layer._store.first > 0 and layer.n_coded > 0
        return found

    expected = logits()
    attach(model)
    assert_as_expanded(logits(), expected, padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [[1, 1, 3, 1], [30, 1, 24]], ids=["short", "long"])
def test_half_precision_models(dtype: torch.dtype, steps: list[int]) -> None:
    preset = preset_of("llama", tiny("llama"))
    model = tiny("llama").to(dtype)
    ids = prompt(2, 54 + sum(steps))
    mask = torch.ones_like(ids)
    expected = logits_of(model, preset, ids, mask, steps)
    got = logits_of(attach(model), preset, ids, mask, steps)
    # Both round everything else to the model's format; ours does not round the decoded keys and values.
    scale = max(float(logits.abs().max()) for logits in expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=0.05 * scale, rtol=0.05)


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


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_nothing_is_expanded_while_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), model=model, uncompressed_tail=8)
    attach(model)
    try:
        with torch.no_grad():
            model(input_ids=prompt(1, 50), past_key_values=cache, use_cache=True)
            monkeypatch.setattr(
                "kvlathe.cache.native_store.NativeStore._read", lambda *_, **__: pytest.fail("expanded")
            )
            for _ in range(20):
                model(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True)
    finally:
        detach(model)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static", "identity"])
def test_chunks_through_other_caches(name: str, padding: int, kind: str) -> None:
    """An attached model reads prompts in chunks through caches that are not ours, or not coded, as before."""
    model = tiny(name)
    ids, mask = prompt(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=80),
            "identity": lambda: identity_cache(model),
        }[kind]()
        outputs = [
            model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end] if padding else None,
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
            for start, end in [(0, 30), (30, 50), (50, 51), (51, 70)]
        ]
        return torch.cat(outputs, 1)

    expected = logits()
    attach(model)
    try:
        got = logits()
    finally:
        detach(model)
    torch.testing.assert_close(got[:, padding:], expected[:, padding:], atol=2e-4, rtol=1e-4)


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
    attach(model)
    try:
        with torch.no_grad():
            for n in (40, 30, 1):
                model(input_ids=prompt(1, n), past_key_values=cache)
    finally:
        detach(model)
    assert len(masks) == 2 * model.config.num_hidden_layers and masks.count(None) == len(masks)


def test_another_attention_set_later_gets_real_keys() -> None:
    """`set_attn_implementation` after `attach`: what stands for keys in ours would be zeros to others."""
    model = tiny("llama")
    preset = preset_of("llama", model)
    ids, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    model.set_attn_implementation("eager")
    expected = logits_of(model, preset, ids, mask, [1, 3])
    attach(model)
    try:
        model.set_attn_implementation("eager")
        got = logits_of(model, preset, ids, mask, [1, 3])
    finally:
        detach(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_generate_from_embeddings() -> None:
    """transformers cannot read embeddings in chunks."""
    model = tiny("llama")
    preset = preset_of("llama", model)
    ids = prompt(1, 600)
    common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    given = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    outputs = []
    for _ in range(2):
        cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
        outputs.append(model.generate(**given, past_key_values=cache, **common))
        attach(model)
    detach(model)
    assert torch.equal(*outputs)


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


@pytest.mark.parametrize("chosen", [{}, {"prefill_chunk_size": 32}, {"prefill_chunk_size": None}])
def test_generate_reads_prompts_in_chunks(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, int | None]
) -> None:
    model = tiny("llama")
    preset = preset_of("llama", model)
    ids = prompt(1, 80)
    common = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    monkeypatch.setattr("kvlathe.attachment.PREFILL_CHUNK_TOKENS", 24)
    lengths: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    attach(model)
    try:
        model.generate(
            past_key_values=CompressedDynamicCache.from_preset(preset, uncompressed_tail=8),
            **common,
            **chosen,
        )
        ours = lengths.copy()
        lengths.clear()
        model.generate(**common)
        stock = lengths.copy()
        lengths.clear()
        model.generate(use_cache=False, **common)
    finally:
        detach(model)
        hook.remove()
    expected = {24: [24, 24, 24, 8], 32: [32, 32, 16], None: [80]}[chosen.get("prefill_chunk_size", 24)]
    assert ours[: len(expected)] == expected
    assert stock[0] == 80 and lengths[0] == 80
    assert "generate" not in vars(model)


@pytest.mark.parametrize(("given", "expected"), [(32, {}), (None, {"prefill_chunk_size": 512})])
def test_a_chunk_size_in_a_config_given_by_position_counts(
    monkeypatch: pytest.MonkeyPatch, given: int | None, expected: dict[str, int]
) -> None:
    model = tiny("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    seen: dict[str, object] = {}

    def generate(self: object, inputs: object, generation_config: object, **kwargs: object) -> None:
        seen.update(kwargs)

    monkeypatch.setattr(type(model), "generate", generate)
    attach(model).generate(prompt(1, 8), GenerationConfig(prefill_chunk_size=given), past_key_values=cache)
    del seen["past_key_values"]
    assert seen == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.UnverifiedPresetWarning")
def test_chunked_prefill_expands_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    cache = CompressedDynamicCache.from_preset(preset_of(name, model), model=model, uncompressed_tail=8)
    monkeypatch.setattr(
        "kvlathe.cache.native_store.NativeStore._read", lambda *_, **__: pytest.fail("expanded")
    )
    attach(model).generate(
        input_ids=prompt(1, 90),
        past_key_values=cache,
        max_new_tokens=3,
        pad_token_id=0,
        prefill_chunk_size=30,
    )
    assert cache.get_seq_length() == 92


def test_a_copy_of_an_attached_model_generates_by_itself() -> None:
    model = attach(tiny("llama"))
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    out = twin.generate(input_ids=prompt(1, 20), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out[0, -1] == 0


def test_two_threads_generate_at_once() -> None:
    model = attach(tiny("llama"))
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
    model = attach(tiny("llama"))
    cache = CompressedDynamicCache.from_preset(preset_of("llama", model), uncompressed_tail=8)
    # Wide enough to be worth several threads.
    keys = torch.randn(1, *cache_shape(model, 4000))
    cache.update(keys, keys, 0)
    queries = torch.randn(1, model.config.num_attention_heads, 1, keys.shape[-1])
    expected = cache.layers[0].attend(queries, mask=None, scaling=0.3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got = cache.layers[0].attend(queries, mask=None, scaling=0.3)
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
