"""What cannot work says so in one sentence, and nothing wrong comes out instead."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from behaviours import feed, generate
from cache_helpers import compressed_cache, identity_cache, low_rank, preset_of, tokens
from families import BY_NAME, FAMILIES, Family
from kvlathe import CompressedDynamicCache, IdentityCompressor, Preset, verify
from kvlathe._native import Preset as NativePreset
from kvlathe.cache.layer_kinds import layer_kinds
from kvlathe.errors import KvlatheError, ModelError, PresetError, RollbackError, ShapeError
from tiny_models import tiny


def _without_config(n_layers: int) -> CompressedDynamicCache:
    return CompressedDynamicCache(*[[IdentityCompressor()] * n_layers for _ in range(2)], num_layers=n_layers)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.keeps_states], ids=lambda f: f.name)
def test_hybrid_models_need_the_config(family: Family) -> None:
    cache = _without_config(len(family.stock_cache().layers))
    with pytest.raises(ModelError, match=r"config=model\.config"):
        generate(family, tokens(20), cache)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("with_config", [False, True])
def test_encoder_decoder_models_need_a_cache_for_cross_attention(name: str, with_config: bool) -> None:
    family = BY_NAME[name]
    cache = identity_cache(family.model) if with_config else _without_config(2)
    with pytest.raises(ModelError, match=r"EncoderDecoderCache\(cache, DynamicCache\(\)\)"):
        generate(family, tokens(20), cache)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.keeps_states], ids=lambda f: f.name)
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


def test_a_convolution_that_records_nothing_cannot_be_rolled_back() -> None:
    """transformers says so halfway through its layers; here nothing has been changed."""
    family = BY_NAME["lfm2"]
    cache, untouched = family.coded_cache(), family.coded_cache()
    for each in (cache, untouched):
        feed(family, each, tokens(60))
    with pytest.raises(RollbackError, match=r"activate_past_recording\(\)"):
        cache.crop(-3)
    assert cache.get_seq_length() == 60
    given, expected = (feed(family, each, tokens(3, seed=1)) for each in (cache, untouched))
    assert torch.equal(given, expected)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "falcon_h1", "zamba2", "nemotron_h"])
def test_rows_of_a_hybrid_are_picked_and_repeated(name: str) -> None:
    """States go with their keys and values: each row goes on as it would alone."""
    family = BY_NAME[name]
    prompt, more = tokens(50, batch=2), tokens(2, seed=1, batch=3)
    cache = family.coded_cache()
    feed(family, cache, prompt)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    given = feed(family, cache, more)
    alone = []
    for row, new in zip((1, 0, 0), more, strict=True):
        single = family.coded_cache()
        feed(family, single, prompt[row : row + 1])
        alone.append(feed(family, single, new[None]))
    torch.testing.assert_close(given, torch.cat(alone), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_hybrids_are_counted(name: str) -> None:
    family = BY_NAME[name]
    cache, reference = family.coded_cache(), family.stock_cache()
    for each in (cache, reference):
        feed(family, each, tokens(400))
    stats = cache.get_memory_stats()
    states = sum(
        state.nbytes
        for layer in reference.layers
        for held in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
        for state in held.values()
    )
    keys_and_values = sum(
        states.nbytes
        for layer in reference.layers
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if states is not None
    )
    assert stats["stock_bytes"] == states > 0
    assert stats["stock_layers"] == (1 if name == "qwen3_next" else 0)
    assert stats["uncompressed_bytes_equivalent"] == states + keys_and_values
    assert 0 < stats["coded_bytes"] < stats["total_bytes"] < states + keys_and_values
    assert 6 < stats["bits_per_value"] < 16


@pytest.mark.parametrize("name", ["qwen3_next", "zamba2"])
def test_hybrids_are_copied_and_saved(name: str) -> None:
    family = BY_NAME[name]
    cache = family.coded_cache()
    feed(family, cache, tokens(60))
    saved = io.BytesIO()
    torch.save(cache, saved)
    saved.seek(0)
    expected = feed(family, copy.deepcopy(cache), tokens(2, seed=1))
    assert torch.equal(feed(family, torch.load(saved), tokens(2, seed=1)), expected)


def test_a_preset_of_a_hybrid_and_its_dense_sibling() -> None:
    """In both directions, and for a hybrid whose layers stand elsewhere."""
    hybrid = BY_NAME["lfm2"].model
    dense, moved, other_type = (
        tiny("lfm2", layer_types=["full_attention"] * 2),
        tiny("lfm2", layer_types=["full_attention", "conv"]),
        tiny("llama"),
    )
    preset = preset_of("lfm2")
    for other in (dense, moved, other_type):
        with pytest.raises(PresetError, match="was calibrated for"):
            CompressedDynamicCache.from_preset(preset, model=other, uncompressed_tail=0)
        with pytest.raises(PresetError, match="was calibrated for"):
            verify(other, None, [], preset)
    with pytest.raises(PresetError, match="was calibrated for"):
        CompressedDynamicCache.from_preset(preset_of("llama"), model=hybrid, uncompressed_tail=0)


def test_a_preset_without_a_fingerprint_says_which_layers_it_codes() -> None:
    content = json.loads(preset_of("lfm2").native.to_json())
    for key in ("fingerprint", "cache_fingerprint"):
        content["kvlathe"][key] = ""
    preset = Preset(NativePreset.from_bytes(json.dumps(content).encode()))
    assert preset.coded_layers == [1] and preset.layer_shapes == [None, (2, 16, 16)]
    CompressedDynamicCache.from_preset(preset, model=BY_NAME["lfm2"].model, uncompressed_tail=0)
    with pytest.raises(PresetError, match=r"layers \[1\]"):
        moved = tiny("lfm2", layer_types=["full_attention", "conv"])
        CompressedDynamicCache.from_preset(preset, model=moved, uncompressed_tail=0)
