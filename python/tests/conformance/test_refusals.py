"""What cannot work says so in one sentence, and nothing wrong comes out instead."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from behaviours import feed, generate
from cache_helpers import compressed_cache, identity_cache, low_rank, tokens
from families import BY_NAME, FAMILIES
from kvlathe import CompressedDynamicCache, IdentityCompressor
from kvlathe.cache.layer_kinds import layer_kinds
from kvlathe.errors import KvlatheError, ModelError, RollbackError, ShapeError


def _without_config(n_layers: int) -> CompressedDynamicCache:
    return CompressedDynamicCache(*[[IdentityCompressor()] * n_layers for _ in range(2)], num_layers=n_layers)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_hybrid_models_need_the_config(name: str) -> None:
    with pytest.raises(ModelError, match=r"config=model\.config"):
        generate(BY_NAME[name], tokens(20), _without_config(2))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("with_config", [False, True])
def test_encoder_decoder_models_need_a_cache_for_cross_attention(name: str, with_config: bool) -> None:
    family = BY_NAME[name]
    cache = identity_cache(family.model) if with_config else _without_config(2)
    with pytest.raises(ModelError, match=r"EncoderDecoderCache\(cache, DynamicCache\(\)\)"):
        generate(family, tokens(20), cache)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name not in ("lfm2", "qwen3_next")], ids=lambda f: f.name
)
def test_without_the_config_every_token_is_held(family: object) -> None:
    """The seed's constructor: right tokens, only more memory where layers have windows."""
    assert hasattr(family, "stock_cache")
    if family.is_encoder_decoder:
        pytest.skip("its cache is two caches")
    cache = _without_config(len(family.stock_cache().layers))
    ids = tokens(60)
    given, expected = generate(family, ids, cache), generate(family, ids, family.stock_cache())
    assert torch.equal(given, expected)
    assert cache.get_memory_stats()["window_layers"] == 0
    held = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
    assert set(held) == {67}


def test_a_config_of_another_depth() -> None:
    config = BY_NAME["gemma3"].model.config
    with pytest.raises(ShapeError, match=r"num_layers is 2.*has 4 layers"):
        CompressedDynamicCache(*[[IdentityCompressor()] * 2] * 2, num_layers=2, config=config)


def test_a_layer_type_that_transformers_has_no_cache_for() -> None:
    class Odd(PreTrainedConfig):
        model_type = "odd"
        num_hidden_layers = 1

    config = Odd()
    # Past the config's own check, as a model from the hub with code of its own would be.
    object.__setattr__(config, "layer_types", ["wavelet"])
    with pytest.raises(ModelError, match="wavelet"):
        layer_kinds(config, 1)


def test_latents_are_kept_exact() -> None:
    """A user's own compressors for a model with multi-head latent attention: they are not used."""
    family = BY_NAME["deepseek_v3"]
    sides = [[low_rank()] * 2, [low_rank()] * 2]
    cache = CompressedDynamicCache(*sides, num_layers=2, config=family.model.config)
    assert torch.equal(
        generate(family, tokens(40), cache), generate(family, tokens(40), family.stock_cache())
    )
    stats = cache.get_memory_stats()
    assert (stats["stock_layers"], stats["compressed_tokens"], stats["coded_bytes"]) == (2, 0, 0)
    assert stats["total_bytes"] == stats["stock_bytes"] == stats["uncompressed_bytes_equivalent"] > 0


def test_hybrid_models_compress_their_attention() -> None:
    """With a user's own compressors; states of convolutions stay as they are and are counted."""
    family = BY_NAME["lfm2"]
    sides = [[low_rank(rank=16)] * 2, [low_rank(rank=16)] * 2]
    cache = CompressedDynamicCache(*sides, num_layers=2, config=family.model.config)
    reference = DynamicCache(config=family.model.config)
    exact, coded = (feed(family, each, tokens(60)) for each in (reference, cache))
    stats = cache.get_memory_stats()
    assert (stats["stock_layers"], stats["compressed_tokens"]) == (1, 60)
    assert stats["stock_bytes"] == reference.layers[0].conv_states[0].nbytes
    exact, coded = (feed(family, each, tokens(1, seed=1)) for each in (reference, cache))
    error = (coded - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.05


def test_a_rollback_that_a_window_cannot_follow() -> None:
    family = BY_NAME["gemma3"]
    cache = compressed_cache("gemma3", tail=8, **family.overrides)
    feed(family, cache, tokens(90))
    with pytest.raises(RollbackError, match="activate_past_recording"):
        cache.crop(-30)
    # Refused as a whole: full layers have not been cropped either.
    assert {layer.get_seq_length() for layer in cache.layers} == {90}
    feed(family, cache, tokens(3))
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert torch.isfinite(feed(family, cache, tokens(30))).all()


def test_a_recurrent_state_cannot_be_rolled_back() -> None:
    family = BY_NAME["qwen3_next"]
    cache = family.exact_cache()
    feed(family, cache, tokens(20))
    with pytest.raises(RollbackError, match="recurrent state"):
        cache.crop(-1)
    assert isinstance(RollbackError("x"), (KvlatheError, RuntimeError))
    assert cache.get_seq_length() == 20


def test_repeated_updates_by_hand_are_fine() -> None:
    """Filling a layer piece by piece, without a model, is no encoder-decoder model."""
    family = BY_NAME["llama"]
    cache = family.exact_cache()
    feed(family, cache, tokens(20))
    for layer in (0, 0, 1, 1):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
    assert cache.get_seq_length() == 26
