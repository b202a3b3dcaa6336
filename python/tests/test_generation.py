"""Branching, rollback and re-use of a cache, half precision, more bits; `conformance` has `generate` in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from cache_helpers import TAIL, compressed_cache, identity_cache, low_rank, model_of, random_kv, tokens
from kvlathe import CompressedDynamicCache, IdentityCompressor, Preset, StreamSetCompressor
from kvlathe.calibration.quality import Evaluator, coders
from kvlathe.model_loading import LoadedModel

# One of each kind: half-split RoPE, sliding window, no RoPE, interleaved and partial RoPE.
FEW_NAMES = ["llama", "gemma3", "gpt2", "glm"]
NEW = 10

MakeCache = Callable[[], Cache]


def _generate(model: PreTrainedModel, ids: Tensor, cache: Cache, **kwargs: Any) -> Tensor:
    torch.manual_seed(3)
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, **kwargs}
    # Some random models like to end at once, and lengths are compared here.
    return model.generate(ids, past_key_values=cache, min_new_tokens=kwargs["max_new_tokens"], **kwargs)


def _greedy(model: PreTrainedModel, cache: Cache) -> Tensor:
    return _generate(model, tokens(40), cache)


def _prompt_lookup(model: PreTrainedModel, cache: Cache) -> Tensor:
    ids = tokens(12).repeat(1, 4)
    return _generate(model, ids, cache, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_of(name)).to(dtype)
    assert torch.equal(_greedy(model, identity_cache(model)), _greedy(model, DynamicCache()))


@pytest.mark.parametrize("name", FEW_NAMES)
def test_more_bits_give_closer_logits(name: str) -> None:
    model = model_of(name)
    ids = tokens(90, seed=5)
    with torch.no_grad():
        exact = model(ids).logits[0, -1]
        errors = []
        for bits in (2.0, 4.0, 8.0):
            cache = compressed_cache(name, bits, tail=0)
            for part in (ids[:, :-1], ids[:, -1:]):
                logits = model(part, past_key_values=cache).logits[0, -1]
            errors.append(float((logits - exact).norm()))
    assert errors[0] > errors[1] > errors[2]


# Branching, rollback and re-use. A forward pass in pieces of a fixed size gives the reference.


def _feed(model: PreTrainedModel, cache: Cache, ids: Tensor, step: int = 1) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(i, past_key_values=cache).logits for i in ids.split(step, dim=1)], dim=1)


@pytest.fixture(params=["native", "torch", "low_rank", "identity"])
def make_cache(request: pytest.FixtureRequest) -> MakeCache:
    """Empty caches for the tiny llama, one kind after another."""

    class Plain(StreamSetCompressor):
        """The same codec through the torch store: the native one takes the class itself only."""

    def make() -> Cache:
        if request.param == "identity":
            return identity_cache(model_of("llama"))
        if request.param == "low_rank":
            return CompressedDynamicCache(
                [IdentityCompressor()] * 2, [low_rank(rank=16)] * 2, 2, uncompressed_tail=TAIL
            )
        cache = compressed_cache("llama")
        if request.param == "native":
            return cache
        sides = [
            [Plain(cache.compressor(layer, side).native) for layer in range(2)] for side in ("key", "value")
        ]
        return CompressedDynamicCache(*sides, 2, uncompressed_tail=TAIL)

    return make


def _contents(cache: Cache) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def _assert_same(given: Cache, expected: Cache) -> None:
    assert given.get_seq_length() == expected.get_seq_length()
    for a, b in zip(_contents(given), _contents(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_deepcopy_branches_one_prefix(make_cache: MakeCache) -> None:
    model = model_of("llama")
    prefix, left, right = tokens(53), tokens(20, seed=1), tokens(20, seed=2)
    shared = make_cache()
    _feed(model, shared, prefix, 53)
    before = [t.clone() for t in _contents(shared)]
    branches = [copy.deepcopy(shared) for _ in range(2)]
    logits = [_feed(model, b, ids) for b, ids in zip(branches, (left, right), strict=True)]
    for branch, ids, given in zip(branches, (left, right), logits, strict=True):
        alone = make_cache()
        _feed(model, alone, prefix, 53)
        torch.testing.assert_close(given, _feed(model, alone, ids), rtol=1e-5, atol=1e-5)
        _assert_same(branch, alone)
    assert all(torch.equal(a, b) for a, b in zip(_contents(shared), before, strict=True))
    assert isinstance(branches[0], CompressedDynamicCache)


def test_deepcopy_of_an_empty_cache(make_cache: MakeCache) -> None:
    model = model_of("llama")
    empty = make_cache()
    twin = copy.deepcopy(empty)
    _feed(model, twin, tokens(30), 30)
    assert (empty.get_seq_length(), twin.get_seq_length()) == (0, 30)


def test_generate_from_a_copied_prefix(make_cache: MakeCache) -> None:
    """The usual idiom: one prefilled system prompt, a copy for each question."""
    model = model_of("llama")
    prefix = tokens(41)
    prefilled = make_cache()
    _feed(model, prefilled, prefix, 41)
    for seed in (1, 2):
        ids = torch.cat([prefix, tokens(6, seed=seed)], dim=1)
        again = make_cache()
        _feed(model, again, prefix, 41)
        expected = _generate(model, ids, again)
        assert torch.equal(_generate(model, ids, copy.deepcopy(prefilled)), expected)


def test_reset_and_reuse(make_cache: MakeCache) -> None:
    model = model_of("llama")
    cache = make_cache()
    _feed(model, cache, tokens(47, batch=2), 47)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
    fresh = make_cache()
    for each in (cache, fresh):
        _feed(model, each, tokens(50, seed=4), 10)
    _assert_same(cache, fresh)


def test_reset_after_assisted_decoding(make_cache: MakeCache) -> None:
    model = model_of("llama")
    cache = make_cache()
    _prompt_lookup(model, cache)
    cache.reset()
    fresh = make_cache()
    for each in (cache, fresh):
        _feed(model, each, tokens(50, seed=4), 10)
    _assert_same(cache, fresh)


def test_batch_repeat_interleave(make_cache: MakeCache) -> None:
    model = model_of("llama")
    ids, more = tokens(50, batch=2), tokens(9, seed=1, batch=6)
    repeated, reference = make_cache(), make_cache()
    _feed(model, repeated, ids, 50)
    repeated.batch_repeat_interleave(3)
    _feed(model, reference, ids.repeat_interleave(3, dim=0), 50)
    _assert_same(repeated, reference)
    torch.testing.assert_close(
        _feed(model, repeated, more), _feed(model, reference, more), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([2, 0]),
        torch.tensor([1, 1, 1, 0]),
        torch.tensor([-1]),
        torch.tensor([True, False, True]),
    ],
    ids=str,
)
def test_batch_select_indices(make_cache: MakeCache, indices: Tensor) -> None:
    model = model_of("llama")
    ids = tokens(50, batch=3)
    more = tokens(9, seed=1, batch=3)[indices]
    selected, reference = make_cache(), make_cache()
    _feed(model, selected, ids, 50)
    selected.batch_select_indices(indices)
    _feed(model, reference, ids[indices], 50)
    _assert_same(selected, reference)
    torch.testing.assert_close(
        _feed(model, selected, more), _feed(model, reference, more), rtol=1e-4, atol=1e-4
    )


def test_reorder_cache(make_cache: MakeCache) -> None:
    model = model_of("llama")
    ids = tokens(50, batch=3)
    reordered, reference = make_cache(), make_cache()
    _feed(model, reordered, ids, 50)
    reordered.reorder_cache(torch.tensor([2, 2, 0]))
    _feed(model, reference, ids[[2, 2, 0]], 50)
    _assert_same(reordered, reference)


@pytest.mark.parametrize("n_removed", [1, 5, 8])
def test_crop_within_the_tail_leaves_no_trace(make_cache: MakeCache, n_removed: int) -> None:
    """Fed in one piece, so that no block leaves the tail because of tokens that are removed again."""
    model = model_of("llama")
    kept, wrong, more = tokens(52), tokens(n_removed, seed=1), tokens(12, seed=2)
    cropped, reference = make_cache(), make_cache()
    _feed(model, cropped, kept, 52)
    _feed(model, reference, kept, 52)
    for layer in cropped.layers:
        layer.activate_past_recording()  # as speculative decoding does
    _feed(model, cropped, wrong, n_removed)
    cropped.crop(-n_removed)
    _assert_same(cropped, reference)
    torch.testing.assert_close(
        _feed(model, cropped, more), _feed(model, reference, more), rtol=1e-4, atol=1e-4
    )


def test_crop_within_the_tail_without_speculation(make_cache: MakeCache) -> None:
    """A plain crop is without a trace, too, as long as nothing was coded because of the tokens it removes."""
    model = model_of("llama")
    ids, more = tokens(54), tokens(4, seed=2)
    cropped, reference = make_cache(), make_cache()
    _feed(model, cropped, ids, 54)  # 4 sinks, 32 coded, 18 in the tail
    _feed(model, reference, ids[:, :52], 52)
    if cropped.get_memory_stats()["compressed_tokens"] != reference.get_memory_stats()["compressed_tokens"]:
        pytest.skip("coded token by token: the last two tokens have pushed two others out of the tail")
    cropped.crop(-2)
    _assert_same(cropped, reference)
    torch.testing.assert_close(
        _feed(model, cropped, more), _feed(model, reference, more), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("n_kept", [0, 2, 4, 7, 12, 21, 36, 60])
def test_crop_far_into_blocks(make_cache: MakeCache, n_kept: int) -> None:
    model = model_of("llama")
    ids = tokens(90)
    cache = make_cache()
    _feed(model, cache, ids, 90)
    before = [t.clone() for t in _contents(cache)]
    cache.crop(n_kept - 90)
    assert cache.get_seq_length() == n_kept
    for layer in cache.layers:
        assert layer.get_seq_length() == n_kept
    # What stays is what was there: coded tokens as decoded, exact ones exact.
    for given, expected in zip(_contents(cache), before, strict=True):
        torch.testing.assert_close(given, expected[:, :, :n_kept], rtol=1e-6, atol=1e-6)
    logits = _feed(model, cache, ids[:, n_kept:], 5)
    assert cache.get_seq_length() == 90
    stats = cache.get_memory_stats()
    assert stats["compressed_tokens"] + stats["uncompressed_tokens"] == 90
    with torch.no_grad():
        exact = model(ids).logits[:, n_kept:]
    error = (logits - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm()
    assert float(error) < 0.2


@pytest.mark.parametrize("n_removed", [40, 41, 1000])
def test_crop_of_everything_and_more(make_cache: MakeCache, n_removed: int) -> None:
    cache = make_cache()
    _feed(model_of("llama"), cache, tokens(40), 40)
    cache.crop(-n_removed)
    assert cache.get_seq_length() == 0
    _feed(model_of("llama"), cache, tokens(40, seed=1), 40)
    assert cache.get_seq_length() == 40


def test_crop_of_nothing(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.crop(0)
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    _feed(model_of("llama"), cache, tokens(40), 40)
    cache.crop(0)
    assert cache.get_seq_length() == 40


def test_no_tokens_at_all(make_cache: MakeCache) -> None:
    """transformers initialises some caches with tensors of length 0."""
    cache = make_cache()
    nothing = torch.zeros(1, 2, 0, 16)
    keys, values = cache.update(nothing, nothing, 0)
    assert keys.shape == values.shape == (1, 2, 0, 16)
    assert cache.get_seq_length() == 0
    cache.reset()
    _feed(model_of("llama"), cache, tokens(30), 30)
    keys, _ = cache.update(nothing, nothing, 0)
    assert keys.shape[2] == cache.get_seq_length() == 30


def test_gradients_are_not_kept(make_cache: MakeCache) -> None:
    cache = make_cache()
    model = model_of("llama")
    for _ in range(3):
        model(tokens(20), past_key_values=cache)
    assert not any(t.requires_grad for t in _contents(cache))


def test_returned_tensors_are_the_callers_own(make_cache: MakeCache) -> None:
    """A model may write to what `update` gives it."""
    keys, values = random_kv(41)
    written_to, untouched = make_cache(), make_cache()
    for part in (slice(0, 40), slice(40, 41)):
        untouched.update(keys[:, :, part], values[:, :, part], 0)
        # The very first call returns its arguments, which belong to the caller anyway.
        for tensor in written_to.update(keys[:, :, part].clone(), values[:, :, part].clone(), 0):
            tensor.fill_(9.0)
    for name in ("keys", "values"):
        assert torch.equal(getattr(written_to.layers[0], name), getattr(untouched.layers[0], name))


@pytest.mark.slow_model
def test_the_real_model_with_its_bundled_preset(smollm2: LoadedModel, bundled_preset: Preset) -> None:
    """At 3 bits it goes on as with the exact cache, and the evaluator finds next to nothing lost."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    text = tokenizer(_some_prose(), return_tensors="pt").input_ids[0, :256]
    assert len(text) == 256
    cache = CompressedDynamicCache.from_preset(
        bundled_preset.with_bits(3.0), model=model, uncompressed_tail=0
    )
    quality = Evaluator(model, [text], tail=32).run(*coders(cache))
    assert quality.kld < 0.01
    assert quality.top1 > 0.9
    prompt = torch.cat([text[None], tokenizer("\n\nIn short,", return_tensors="pt").input_ids], dim=1)
    given, expected = (_generate(model, prompt, each, max_new_tokens=4) for each in (cache, DynamicCache()))
    assert tokenizer.decode(given[0]) == tokenizer.decode(expected[0])
    stats = cache.get_memory_stats()
    assert stats["compressed_tokens"] >= 224
    assert (
        stats["compression_ratio"] > 4
    )  # float32 against 3 bits, up to 63 and the sinks of some 260 tokens exact


def _some_prose() -> str:
    """Some that every Python carries."""
    from pydoc_data.topics import topics

    return str(topics["assignment"])
