"""Situations from public reports about caches: each behaves as with the stock cache, or says what to do.

Where nothing is coded yet (`exact`), as the stock cache means equal; with coded tokens it means what the expanded cache
gives.
"""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    TextStreamer,
)

from cache_helpers import compressed_cache, model_of, preset_of, random_kv, tokens
from kvlathe import CompressedDynamicCache, ExpandedWarning, GradientError, IdentityCompressor
from tiny_models import tiny

_GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


def exact(name: str = "llama") -> CompressedDynamicCache:
    """A cache that will code nothing in this test."""
    return compressed_cache(name, start=10**6)


def _frozen_but(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return model


@pytest.mark.parametrize("trained", [("q_proj",), ("q_proj", "v_proj"), ("k_proj",), ("o_proj",)])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")
def test_adapters_are_trained_behind_a_frozen_prefix(trained: tuple[str, ...]) -> None:
    """LoRA on some projections (trl 2669, peft 869): every layer gets its gradients."""
    gradients = []
    for make in (DynamicCache, exact):
        model, cache = _frozen_but(tiny("llama"), *trained), make()
        with torch.no_grad():
            model(tokens(100), past_key_values=cache)
        model(tokens(20, 1), past_key_values=cache, labels=tokens(20, 1)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")
def test_a_prefix_computed_with_gradients(attention: str) -> None:
    """Gist tokens, training in chunks: the graph of held tokens is gone, and a loss that needs it is told."""
    model, cache = tiny("llama", attn_implementation=attention), exact()
    model(tokens(60), past_key_values=cache)
    loss = model(tokens(20, 1), past_key_values=cache, labels=tokens(20, 1)).loss
    with pytest.raises(GradientError, match=r"60 tokens.*torch\.no_grad\(\).*DynamicCache"):
        loss.backward()
    # Who needs no gradients is not bothered.
    with torch.no_grad():
        model(tokens(1), past_key_values=cache)
    # Nor is, after a reset, who needs none of the prefix's.
    cache.reset()
    with torch.no_grad():
        model(tokens(60), past_key_values=cache)
    model(tokens(20, 1), past_key_values=cache, labels=tokens(20, 1)).loss.backward()


@pytest.mark.parametrize("make", [exact, lambda: compressed_cache("llama")], ids=["exact", "coded"])
def test_autocast_around_a_float32_model(make: Any) -> None:
    """transformers 30019: keys are float32 there (rotated), values bfloat16."""
    model, ids = model_of("llama"), tokens(80)
    outputs = []
    for cache in (DynamicCache(), make()):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            parts = [
                model(part, past_key_values=cache).logits
                for part in (ids[:, :60], ids[:, 60:61], ids[:, 61:])
            ]
            generated = model.generate(ids, past_key_values=copy.deepcopy(cache), **_GREEDY)
        # And on without it.
        with torch.no_grad():
            parts.append(model(ids[:, :1], past_key_values=cache).logits)
        outputs.append(torch.cat(parts, 1).float())
        assert generated.shape == (1, 86)
    assert float((outputs[1] - outputs[0]).abs().mean()) < 0.05 * float(outputs[0].std())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")
def test_hidden_states_and_attentions(attention: str) -> None:
    """transformers 32117: all tokens', of every layer."""
    model, ids = tiny("llama", attn_implementation=attention), tokens(700)
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True}
    if attention == "eager":
        wanted["output_attentions"] = True
    expected, got = (
        model.generate(ids, past_key_values=cache, **_GREEDY, **wanted) for cache in (DynamicCache(), exact())
    )
    for name in ("hidden_states", "attentions") if attention == "eager" else ("hidden_states",):
        for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert got.hidden_states[0][-1].shape == (1, 700, 64)


@pytest.fixture(scope="module")
def gemma3() -> PreTrainedModel:
    """With a vision tower: tokens of one image see each other."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"],
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 4,
    }
    tokens_of_image = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=64, **tokens_of_image)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.mark.parametrize("before", [440, 480])
def test_an_image_anywhere_in_a_prompt(gemma3: PreTrainedModel, before: int) -> None:
    """vllm 10290, 18414: tokens of an image see each other, wherever a chunk might end (512)."""
    ids = torch.cat([tokens(before) % 100 + 20, torch.full((1, 64), 5), tokens(40, 1) % 100 + 20], 1)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == 5).long(),
        "pixel_values": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    }
    wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4, "do_sample": False}
    sides = [[IdentityCompressor()] * 2 for _ in range(2)]
    cache = CompressedDynamicCache(*sides, num_layers=2, config=gemma3.config)
    expected = gemma3.generate(**given, **wanted)
    got = gemma3.generate(**given, **wanted, past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, exact], ids=["stock", "ours"])
def test_a_prompt_that_the_cache_holds_already(make: Any) -> None:
    """transformers 40906, 36151, 38727: regenerate."""
    model, ids, cache = model_of("llama"), tokens(100), make()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    out = model.generate(ids, past_key_values=cache, **_GREEDY)
    assert out.shape == (1, 106)


def test_a_prefix_copied_in_every_requests_thread() -> None:
    """transformers 32159: copies are made side by side, and each is whole."""
    prefix = compressed_cache("llama")
    with torch.no_grad():
        model_of("llama")(tokens(600), past_key_values=prefix)
    keys = prefix.layers[0].keys
    found: list[object] = []

    def request() -> None:
        for _ in range(50):
            try:
                found.append(torch.equal(copy.deepcopy(prefix).layers[0].keys, keys))
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def test_a_generation_config_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.pad_token_id = 3, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = model.generate(tokens(60), generation_config=config, past_key_values=compressed_cache("llama"))
    assert out.shape == (1, 63) and "deprecated" not in caplog.text


def test_hooks_of_others() -> None:
    """accelerate's, which send tensors from device to device, and a user's on attention's inputs and outputs."""
    accelerate = pytest.importorskip("accelerate")
    model, seen = copy.deepcopy(model_of("llama")), []
    expected = model.generate(tokens(60), past_key_values=compressed_cache("llama"), **_GREEDY)
    model.model.layers[0].self_attn.register_forward_hook(lambda *given: seen.append(given[2][0].shape))
    accelerate.cpu_offload(model, execution_device="cpu")
    cache = compressed_cache("llama")
    assert torch.equal(model.generate(tokens(60), past_key_values=cache, **_GREEDY), expected)
    assert seen and cache.get_memory_stats()["expanded_layers"] == 0


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(model_of("llama")), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    cache = compressed_cache("llama")
    model.eval().generate(input_ids=tokens(60), past_key_values=cache, **_GREEDY)
    assert cache.get_memory_stats()["expanded_layers"] == 0


def test_dropout_of_attention_in_training() -> None:
    """As with the stock cache: the same random numbers drop the same weights."""
    outputs = []
    for cache in (DynamicCache(), exact()):
        model = tiny("llama", attention_dropout=0.5)
        with torch.no_grad():
            model(tokens(60), past_key_values=cache)
            model.train()
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExpandedWarning)
                outputs.append(model(tokens(5, 1), past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_two_caches_in_turns_on_one_model() -> None:
    """Speculative servers, contrastive decoding: passes of one do not disturb the other's."""
    model = model_of("llama")
    first, second, alone = (compressed_cache("llama") for _ in range(3))
    got: list[Tensor] = []
    expected: list[Tensor] = []
    with torch.no_grad():
        for part in tokens(90).split(30, dim=1):
            got.append(model(part, past_key_values=first).logits)
            model(part.flip(1), past_key_values=second)
        expected = [model(part, past_key_values=alone).logits for part in tokens(90).split(30, dim=1)]
    assert torch.equal(torch.cat(got, 1), torch.cat(expected, 1))


def test_a_streamer_and_inference_mode() -> None:
    model = model_of("llama")

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))

    expected = model.generate(tokens(60), past_key_values=compressed_cache("llama"), **_GREEDY)
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=16)
    with torch.inference_mode():
        got = model.generate(tokens(60), past_key_values=cache, streamer=TextStreamer(Words()), **_GREEDY)
        assert torch.equal(got, expected)
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :9] = 0
        padded = compressed_cache("llama")
        model.generate(tokens(60, batch=2), attention_mask=mask, past_key_values=padded, **_GREEDY)
    assert padded.get_memory_stats()["expanded_layers"] == 0
    # What inference mode has filled goes on outside of it.
    with torch.no_grad():
        model(tokens(1), past_key_values=cache)
    cache.update(*random_kv(1), 0)
