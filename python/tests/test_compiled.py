"""Compiled models: the same results, and no other breaks of the graph than one where a layer hands its tokens over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cache_helpers import compressed_cache, model_of, tokens
from kvlathe import CacheStateError, ExpandedWarning
from kvlathe.cache import dynamic_cache

pytestmark = pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")


def _whole(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _layer_by_layer(model: PreTrainedModel) -> PreTrainedModel:
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = torch.compile(layer, backend="eager")
    return model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """With patience for what transformers wraps around a forward, which is compiled for each of its callers."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("compile_model", [_whole, _layer_by_layer])
@torch.no_grad()
def test_compiled_models_write_the_same(
    name: str, compile_model: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = copy.deepcopy(model_of(name))
    expected, got = (compressed_cache(name) for _ in range(2))
    parts = [tokens(60), *tokens(12, 1).split(1, dim=1)]
    plain = [model(part, past_key_values=expected).logits for part in parts]
    compiled = compile_model(model)
    for part, want in zip(parts, plain, strict=True):
        logits: Tensor = compiled(part, past_key_values=got).logits
        assert float((logits - want).abs().max()) < 0.01 * float(want.std())
    assert got.get_seq_length() == expected.get_seq_length() == 72
    assert [layer.n_coded for layer in got.layers] == [layer.n_coded for layer in expected.layers]


@torch.no_grad()
def test_the_graph_is_left_only_where_tokens_are_handed_over() -> None:
    model, cache = model_of("llama"), compressed_cache("llama")
    stock = DynamicCache(config=model.config)
    for each in (cache, stock):
        model(tokens(60), past_key_values=each)
    breaks = {
        name: torch._dynamo.explain(model.forward)(tokens(1), past_key_values=each).break_reasons
        for name, each in (("ours", cache), ("stock", stock))
    }
    assert not breaks["stock"] and breaks["ours"]
    places = {(reason.user_stack[-1].filename, reason.user_stack[-1].name) for reason in breaks["ours"]}
    assert places == {(dynamic_cache.__file__, "update")}


@torch.no_grad()
def test_a_pass_that_broke_off_is_found_out() -> None:
    model, cache = _whole(copy.deepcopy(model_of("llama"))), compressed_cache("llama")
    model(tokens(60), past_key_values=cache)
    for _ in range(3):
        model(tokens(1), past_key_values=cache)
    cache.layers[0].update(*(torch.zeros(1, 2, 1, 16) for _ in range(2)))
    with pytest.raises(CacheStateError, match="layers of this cache hold"):
        model(tokens(1), past_key_values=cache)


@torch.no_grad()
def test_it_is_told() -> None:
    model, cache = _whole(copy.deepcopy(model_of("llama"))), compressed_cache("llama")
    model(tokens(60), past_key_values=cache)
    with pytest.warns(ExpandedWarning, match="compiled"):
        model(tokens(1), past_key_values=cache)
    assert cache.get_memory_stats()["expanded_layers"] == 2
