"""Copies: `copy.deepcopy` gives an equal and independent cache, and pickle works or says why not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

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
from kvlathe import CompressedDynamicCache, KvlatheError, PicklingError, Preset, StreamSetCompressor
from tiny_models import tiny

_GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
_CACHES: dict[str, tuple[str, Callable[[], CompressedDynamicCache]]] = {
    "compressed": ("llama", lambda: compressed_cache("llama")),
    "exact": ("llama", lambda: identity_cache(model_of("llama"))),
    "low rank": ("llama", lambda: CompressedDynamicCache([low_rank()] * 2, [low_rank(seed=4)] * 2, 2)),
    "window": ("gemma3", lambda: compressed_cache("gemma3")),
}


def _contents(cache: CompressedDynamicCache) -> list[Any]:
    return [(layer.keys, layer.values, layer.held, layer.n_coded) for layer in cache.layers]


def _assert_equal(given: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(given, expected, strict=True):
        assert ours[2:] == theirs[2:]
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", _CACHES)
@pytest.mark.parametrize("n_tokens", [0, 3, 90])
def test_a_deep_copy_is_equal_and_independent(kind: str, n_tokens: int) -> None:
    name, make = _CACHES[kind]
    model, cache = model_of(name), make()
    if n_tokens:
        with torch.no_grad():
            model(input_ids=tokens(n_tokens, batch=2), past_key_values=cache)
    before = _contents(cache)
    twin = copy.deepcopy(cache)
    _assert_equal(_contents(twin), before)
    assert twin.get_memory_stats()["seq_len"] == n_tokens
    # The twin does everything that changes a cache.
    with torch.no_grad():
        model(input_ids=tokens(40, seed=1, batch=2), past_key_values=twin)
    twin.reorder_cache(torch.tensor([1, 0]))
    twin.batch_repeat_interleave(2)
    if kind != "window":
        twin.crop(-min(60, n_tokens))
    _assert_equal(_contents(cache), before)
    third = copy.deepcopy(cache)
    twin.reset()
    _assert_equal(_contents(cache), before)
    # And the other way round: the original goes, its copy stays.
    cache.reset()
    del cache
    _assert_equal(_contents(third), before)
    with torch.no_grad():
        lived = model(input_ids=tokens(9, seed=2, batch=2), past_key_values=third).logits
        fresh = make()
        if n_tokens:
            model(input_ids=tokens(n_tokens, batch=2), past_key_values=fresh)
        assert torch.equal(lived, model(input_ids=tokens(9, seed=2, batch=2), past_key_values=fresh).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_serves_many_continuations(attention: str) -> None:
    model = tiny("llama", attn_implementation=attention)
    prefix, cache = tokens(60), compressed_cache("llama")
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache)
    for seed in range(3):
        ids = torch.cat([prefix, tokens(7, seed + 1)], dim=1)
        outputs = [
            model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=10, **_GREEDY)
            for _ in range(2)
        ]
        assert torch.equal(*outputs)
    assert cache.get_seq_length() == 60


def test_a_codec_that_is_no_presets_says_that_it_cannot_be_pickled() -> None:
    class Other(StreamSetCompressor):
        pass

    with pytest.raises(PicklingError, match="native memory") as caught:
        pickle.dumps(Other(preset_of("llama").codec(0, "key")))
    assert isinstance(caught.value, KvlatheError) and isinstance(caught.value, TypeError)


@pytest.mark.parametrize("kind", _CACHES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_gives_an_equal_cache_and_changes_nothing(kind: str, protocol: int) -> None:
    cache = _CACHES[kind][1]()
    cache.update(*random_kv(30, dim=32 if kind == "window" else 16), 0)
    before = _contents(cache)
    twin = pickle.loads(pickle.dumps(cache, protocol))
    _assert_equal(_contents(cache), before)
    _assert_equal(_contents(twin), before)


def test_a_preset_can_be_pickled() -> None:
    """As its file: another process gets the same codecs."""
    preset = preset_of("llama", 3.0)
    # Calibrated in this process, it is rounded once as every file is; after that nothing changes any more.
    twin = pickle.loads(pickle.dumps(preset))
    again = pickle.loads(pickle.dumps(twin))
    assert isinstance(twin, Preset) and twin.meta == again.meta == preset.meta
    assert twin.native.to_json() == again.native.to_json() == preset.native.to_json()
    assert copy.deepcopy(preset) is preset
    keys, values = random_kv(60)
    contents = []
    for each in (twin, again):
        cache = CompressedDynamicCache.from_preset(each, uncompressed_tail=0)
        cache.update(keys, values, 0)
        contents.append(_contents(cache))
    _assert_equal(*contents)


def test_a_copy_in_the_middle_of_a_pass_does_not_pass_for_a_whole() -> None:
    """A hook that copies the cache gets layers that are unlike, and is told when it uses them."""
    model, cache = tiny("llama"), compressed_cache("llama")
    copies: list[CompressedDynamicCache] = []
    with torch.no_grad():
        model(input_ids=tokens(40), past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(cache)))
        model(input_ids=tokens(2), past_key_values=cache)
        hook.remove()
        with pytest.raises(KvlatheError, match="40 to 42 tokens"):
            model(input_ids=tokens(1), past_key_values=copies[0])
        copies[0].crop(0)
        assert [layer.get_seq_length() for layer in copies[0].layers] == [40, 40]
        model(input_ids=tokens(1), past_key_values=cache)


def test_a_shallow_copy_shares_everything() -> None:
    cache = one_layer_cache(stream_compressor(), stream_compressor(side="value"))
    cache.update(*random_kv(20), 0)
    assert copy.copy(cache).layers is cache.layers
