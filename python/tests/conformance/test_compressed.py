"""Compressed mode: the same lengths, masks and shapes, logits within the budget, fused and expanded paths agree.

Families that calibration refuses must be refused with a sentence that names the reason; that is tested here, too, and
the table quotes the sentence.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor
from transformers import Cache

from behaviours import BEHAVIOURS, feed, generate, own, stock_outcome
from cache_helpers import expanded, preset_of, served, tokens
from families import FAMILIES, Family
from kvlathe.cache.layer import CompressedLayer
from kvlathe.errors import ModelError
from test_exact import REFUSALS

CODED = [family for family in FAMILIES if family.calibrates]
FROM_BLOCKS = [family for family in CODED if family.is_served]
# Relative error of the logits at 6 bits; random weights amplify errors from layer to layer, real models stay far below.
BUDGET = 0.12


def _name(family: Family) -> str:
    return family.name


def test_the_matrix_is_complete() -> None:
    names = {family.name for family in FAMILIES}
    assert len(names) == len(FAMILIES)
    assert len(CODED) >= 18 and len(FROM_BLOCKS) >= 18


CELLS = [
    (family, name)
    for family in CODED
    for name in BEHAVIOURS
    if name not in family.not_applicable | family.upstream_refuses
]


@pytest.mark.parametrize(
    ("family", "behaviour"), CELLS, ids=[f"{family.name}-{behaviour}" for family, behaviour in CELLS]
)
def test_compressed(family: Family, behaviour: str) -> None:
    run = BEHAVIOURS[behaviour]
    expected, given = stock_outcome(family.name, behaviour), run(family, family.coded_cache)
    assert given.tokens.shape == expected.tokens.shape
    if given.logits is not None and expected.logits is not None:
        assert given.logits.shape == expected.logits.shape
        assert torch.isfinite(given.logits).all()
    if given.cache is not None and expected.cache is not None:
        assert 0 < own(given.cache).get_memory_stats()["compressed_tokens"] < given.cache.get_seq_length()


REFUSED = [(family, name) for family in CODED for name in sorted(family.upstream_refuses)]


@pytest.mark.parametrize(
    ("family", "behaviour"), REFUSED, ids=[f"{family.name}-{behaviour}" for family, behaviour in REFUSED]
)
def test_what_recurrent_states_refuse(family: Family, behaviour: str) -> None:
    """As in exact mode: nothing wrong comes out because keys and values are coded."""
    with pytest.raises(REFUSALS):
        BEHAVIOURS[behaviour](family, family.coded_cache)


def _stream(family: Family, cache: Cache, ids: Tensor) -> Tensor:
    """Logits of the last 20 tokens, one by one, after a prompt in chunks."""
    for chunk in ids[:, :-20].split(15, dim=1):
        feed(family, cache, chunk)
    return torch.cat([feed(family, cache, each) for each in ids[:, -20:].split(1, dim=1)], dim=1)


@pytest.mark.parametrize("family", CODED, ids=_name)
def test_logits_within_the_budget(family: Family) -> None:
    """In the median of three prompts: a router of experts that flips at a near tie changes all that follows."""
    errors, agreements = [], []
    for seed in (5, 6, 7):
        ids = tokens(95, seed=seed, batch=2)
        exact, coded = _stream(family, family.stock_cache(), ids), _stream(family, family.coded_cache(), ids)
        errors.append(float((coded - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm()))
        agreements.append(float((coded.argmax(-1) == exact.argmax(-1)).double().mean()))
    assert 0 < statistics.median(errors) < BUDGET
    assert statistics.median(agreements) > 0.8


@pytest.mark.parametrize("family", FROM_BLOCKS, ids=_name)
def test_attention_from_blocks_and_expanded_agree(family: Family) -> None:
    ids = tokens(95, seed=5, batch=2)
    with expanded():
        dense = _stream(family, family.coded_cache(), ids)
        padded = _padded(family)
    with served(family.model):
        cache = family.coded_cache()
        fused = _stream(family, cache, ids)
        assert own(cache).get_memory_stats()["expanded_layers"] == 0
        outcome = _padded(family)
        prompt = tokens(40, batch=2)
        beams = generate(family, prompt, family.coded_cache(), num_beams=2)
    # Single codes of tokens that are packed later may round the other way, and random weights amplify that: hence
    # a bound for the whole, and a narrow one for the first step.
    assert float((fused - dense).norm() / dense.norm()) < 0.015
    torch.testing.assert_close(fused[:, 0], dense[:, 0], atol=1e-2, rtol=1e-2)
    if padded is not None and outcome is not None:
        torch.testing.assert_close(outcome, padded, atol=1e-2, rtol=1e-2)
    # An encoder-decoder puts its start token first.
    assert beams.shape == (2, 48 + family.is_encoder_decoder)


def _padded(family: Family) -> Tensor | None:
    """Logits of the first step behind a padded prompt, where that means something."""
    if "left_padding" in family.not_applicable:
        return None
    logits = BEHAVIOURS["left_padding"](family, family.coded_cache).logits
    assert logits is not None
    return logits[0]


@pytest.mark.parametrize("family", CODED, ids=_name)
def test_windows_hold_their_window(family: Family) -> None:
    """What a sliding layer holds stops growing, coded or not, and is counted."""
    sizes = []
    for both in (family.exact_cache(), family.coded_cache()):
        cache = own(both)
        windows = [layer for layer in cache.layers if isinstance(layer, CompressedLayer) and layer.is_sliding]
        assert cache.is_sliding == own(family.stock_cache()).is_sliding
        assert cache.get_memory_stats()["window_layers"] == len(windows)
        if not windows:
            continue
        held = []
        for chunk in tokens(192, seed=2).split(24, dim=1):
            feed(family, both, chunk)
            held.append(sum(sum(layer.memory_use()) for layer in windows))
        assert held[-1] == held[-2] <= held[3]
        sizes.append(held[-1])
        for layer in windows:
            assert layer.keys.shape[2] == layer.sliding_window - 1
            assert layer.get_seq_length() == 192
    if sizes:
        exact, coded = sizes
        assert coded < exact or family.name == "gpt_oss"


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.calibrates], ids=_name)
def test_what_calibration_refuses(family: Family) -> None:
    with pytest.raises(ModelError) as error:
        preset_of(family.name, **family.overrides)
    assert len(str(error.value).splitlines()) == 1
