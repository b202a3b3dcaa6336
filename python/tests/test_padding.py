"""Left-padded rows: their first real tokens are the ones that stay exact."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from cache_helpers import model_of, preset_of, random_kv, stream_compressor, tokens
from kvlathe import CompressedDynamicCache, PaddingWarning, ShapeError
from kvlathe.cache.layer import CompressedLayer
from kvlathe.cache.padding import PaddedRows, Padding, mask_of_slots
from kvlathe.errors import CacheStateError, NonFiniteError
from kvlathe.lazy import PassMemo
from kvlathe.stores import Policy

N_SINKS = 4
LENGTHS = [0, 2, 4, 23]
ROWS = PaddedRows(tuple(LENGTHS), 40)


def mask(length: int) -> Tensor:
    return torch.stack([(torch.arange(length) >= n).long() for n in LENGTHS])


def layer(bits: float = 3.0) -> CompressedLayer:
    sides = (stream_compressor(bits=bits, side=side) for side in ("key", "value"))
    return CompressedLayer(*sides, Policy(N_SINKS, 0, 16))


def filled(n_tokens: int = 120) -> tuple[CompressedLayer, Tensor]:
    of_layer = layer()
    keys, values = random_kv(n_tokens, batch=len(LENGTHS))
    of_layer.padding_noted = ROWS
    of_layer.update(keys, values)
    return of_layer, keys


def test_layers_of_a_pass_share_what_is_made_of_its_mask() -> None:
    mask = (torch.rand(len(LENGTHS), 1, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.5).bool()
    ours, same, other = Padding(LENGTHS, N_SINKS), Padding(LENGTHS, N_SINKS), Padding([1] * 4, N_SINKS)
    memo = PassMemo()
    first = memo.find(mask_of_slots, mask, ours)
    assert memo.find(mask_of_slots, mask, same) is first
    assert not torch.equal(memo.find(mask_of_slots, mask, other), first)
    # Another mask, even with the same content.
    again = memo.find(mask_of_slots, mask.clone(), ours)
    assert again is not first and torch.equal(again, first)
    assert torch.equal(memo.find(mask_of_slots, ~mask, ours), ~first)


def test_lengths_of_a_mask() -> None:
    assert PaddedRows.of(mask(40)) == PaddedRows.of(mask(40).bool()) == ROWS
    assert PaddedRows.of(torch.zeros(2, 5)).lengths == (5, 5)


def test_slots_and_tokens_are_each_others_inverse() -> None:
    padding = Padding(LENGTHS, N_SINKS)
    assert padding.reach == 23 + N_SINKS
    states = torch.arange(40.0).expand(len(LENGTHS), 2, 40).unsqueeze(-1).clone()
    slots = padding.to_slots(states)
    for row, n in enumerate(LENGTHS):
        assert slots[row, 0, :N_SINKS, 0].tolist() == list(range(n, n + N_SINKS))
        assert slots[row, 0, n + N_SINKS :, 0].tolist() == list(range(n + N_SINKS, 40))
    seen = mask_of_slots(mask(40)[:, None, None, :], padding)
    assert torch.equal(seen.sum(-1), mask(40)[:, None, None, :].sum(-1))
    assert bool(seen[..., :N_SINKS].all())
    padding.to_tokens(slots)
    assert torch.equal(slots, states)


def first_tokens_are_exact(of_layer: CompressedLayer, keys: Tensor, lengths: list[int]) -> bool:
    held = of_layer.keys
    assert held is not None
    spans = [(row, slice(n, n + N_SINKS)) for row, n in enumerate(lengths)]
    return all(torch.equal(held[row, :, span], keys[row, :, span]) for row, span in spans)


def test_the_first_real_tokens_stay_exact() -> None:
    of_layer, keys = filled()
    assert of_layer.n_coded > 80
    assert first_tokens_are_exact(of_layer, keys, LENGTHS)
    # All others are where they belong, and what was told is used up.
    held = of_layer.keys
    assert held is not None
    for row, n in enumerate(LENGTHS):
        assert float((held[row, :, n:] - keys[row, :, n:]).abs().max()) < 2.0
    without = layer()
    without.update(keys, keys)
    assert not first_tokens_are_exact(without, keys, LENGTHS)


def test_rows_are_selected_repeated_and_copied() -> None:
    of_layer, keys = filled()
    twin = copy.deepcopy(of_layer)
    order = [3, 3, 1]
    of_layer.reorder_cache(torch.tensor(order))
    assert first_tokens_are_exact(of_layer, keys[order], [LENGTHS[row] for row in order])
    twin.batch_repeat_interleave(2)
    doubled = [row for row in range(len(LENGTHS)) for _ in range(2)]
    assert first_tokens_are_exact(twin, keys[doubled], [LENGTHS[row] for row in doubled])


@pytest.mark.parametrize("n_left", [60, 25, 3, 0])
def test_crop(n_left: int) -> None:
    of_layer, _ = filled()
    before = of_layer.keys
    assert before is not None
    before = before.clone()
    of_layer.crop(n_left - 120)
    assert of_layer.get_seq_length() == n_left
    if n_left:
        assert of_layer.keys is not None
        torch.testing.assert_close(of_layer.keys, before[:, :, :n_left], atol=0.5, rtol=0.1)
    more, values = random_kv(70, batch=len(LENGTHS), seed=1)
    given, _ = of_layer.update(more, values)
    assert torch.equal(given[:, :, n_left:], more)


def test_padding_beyond_the_first_pass_is_said() -> None:
    """The other rows keep their first tokens."""
    of_layer = layer()
    of_layer.padding_noted = ROWS
    keys, values = random_kv(120, batch=len(LENGTHS))
    with pytest.warns(PaddingWarning, match="up to 23 tokens of padding"):
        of_layer.update(keys[:, :, :20], values[:, :, :20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_layer.update(keys[:, :, 20:], values[:, :, 20:])
    rows = [0, 1, 2]
    of_layer.reorder_cache(torch.tensor(rows))
    assert first_tokens_are_exact(of_layer, keys[rows], LENGTHS[:3])


def test_a_row_of_fewer_tokens_than_sinks() -> None:
    """Nothing more will come of it, so nothing is said; all of it is exact, and so are the others' first tokens."""
    of_layer = layer()
    of_layer.padding_noted = PaddedRows((0, 30, 118), 120)
    keys, values = random_kv(120, batch=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_layer.update(keys, values)
    assert first_tokens_are_exact(of_layer, keys[:2], [0, 30])
    held = of_layer.keys
    assert held is not None
    assert torch.equal(held[2, :, 118:], keys[2, :, 118:])


def test_what_was_noted_survives_a_refused_call() -> None:
    of_layer = layer()
    of_layer.padding_noted = ROWS
    keys, values = random_kv(120, batch=len(LENGTHS))
    broken = keys.clone()
    broken[0, 0, 50, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        of_layer.update(broken, values)
    of_layer.update(keys, values)
    assert first_tokens_are_exact(of_layer, keys, LENGTHS)


def test_beams_of_padded_rows() -> None:
    of_layer = layer()
    keys, values = random_kv(60, batch=6)
    of_layer.padding_noted = PaddedRows((0, 9), 60)
    of_layer.update(keys, values)
    assert first_tokens_are_exact(of_layer, keys, [0, 0, 0, 9, 9, 9])
    other = layer()
    other.padding_noted = ROWS
    with pytest.raises(ShapeError, match="4 rows"):
        other.update(keys, values)


def test_note_padding_refuses() -> None:
    model = model_of("llama")
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=0)
    with pytest.raises(ShapeError, match="batch, tokens"):
        cache.note_padding(torch.ones(5))
    model(input_ids=tokens(9), past_key_values=cache)
    with pytest.raises(CacheStateError, match="first tokens"):
        cache.note_padding(torch.ones(1, 9))


@pytest.mark.parametrize("told", ["by the mask", "before"])
@pytest.mark.parametrize("n_padding", [30, 32], ids=["within a block", "whole blocks"])
def test_generate_with_padding(told: str, n_padding: int) -> None:
    """A padded row is as near to the exact logits as the same row alone, although its blocks begin elsewhere."""
    model = model_of("llama")
    preset = preset_of("llama", bits=8.0)
    alone, long = tokens(60, seed=1), tokens(60 + n_padding, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, n_padding, dtype=torch.long), alone], dim=1)])
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :n_padding] = 0
    written = tokens(6, seed=3)[0]

    def logits(ids: torch.Tensor, cache: Cache | None = None, **kwargs: Any) -> torch.Tensor:
        """Of the last row, (6, vocabulary), while it writes ``written``: greedy tokens fork at near ties."""
        n = ids.shape[1]
        out = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=len(written),
            do_sample=False,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, so_far: [int(written[len(so_far) - n])],
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        return torch.stack([each[-1] for each in out.logits])

    cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16)
    if told == "before":
        cache.note_padding(attention_mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PaddingWarning)
        padded = logits(ids, cache, attention_mask=attention_mask)
    assert all(layer.padding.lengths == (0, n_padding) for layer in cache.layers)
    single = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16)
    exact, single_logits = logits(alone), logits(alone, single)
    torch.testing.assert_close(padded[0], exact[0], atol=1e-4, rtol=1e-4)  # the prompt's pass is exact
    error_alone = (single_logits - exact).norm()
    assert 0 < error_alone < 0.02 * (exact - exact.mean(-1, keepdim=True)).norm()
    assert (padded - exact).norm() < 2 * error_alone


def test_generate_infers_padding_from_pad_tokens() -> None:
    """Nobody gives a mask: transformers makes one from the pad tokens, and attention shows it."""
    model = model_of("llama")
    ids = torch.cat([tokens(60, seed=1), tokens(60, seed=2)])
    ids[0, :20] = 0
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PaddingWarning)
        model.generate(ids, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    assert all(layer.padding.lengths == (20, 0) for layer in cache.layers)


def test_a_chunk_shorter_than_the_padding_is_said() -> None:
    model = model_of("llama")
    ids = tokens(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=16)
    with pytest.warns(PaddingWarning, match="first pass"):
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=1,
            pad_token_id=0,
            prefill_chunk_size=16,
        )


def test_a_mask_that_hides_real_tokens_is_no_padding() -> None:
    """A row that does not see itself, strictly causal attention: others see these tokens."""
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    odd = causal.clone()
    odd[0, 0, 0, 0] = False
    for mask in (odd, causal.tril(-1)):
        found = PaddedRows.of_first_pass(mask, 1, 9)
        assert found is not None and found.lengths == (0,)
    assert PaddedRows.of_first_pass(torch.zeros(1, 1, 9, 9, dtype=torch.bool), 1, 9) == PaddedRows((9,), 9)


def test_keys_that_are_read_before_their_attention() -> None:
    """By a hook, say: the mask that comes afterwards still shows the padding."""
    model = model_of("llama")
    ids, mask = tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :30] = 0
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=16)
    update, norms = cache.update, []

    def reading(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        keys, values = update(*args, **kwargs)  # type: ignore[arg-type]
        norms.append(float(keys.norm()))
        return keys, values

    cache.update = reading  # type: ignore[method-assign]
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert len(norms) == 2 and all(layer.padding.lengths == (0, 30) for layer in cache.layers)
    assert all(layer.n_coded > 0 for layer in cache.layers)


def test_recording_goes_on_after_a_refused_first_call() -> None:
    of_layer = layer()
    of_layer.activate_past_recording()
    keys, values = random_kv(40, batch=len(LENGTHS))
    with pytest.raises(NonFiniteError):
        of_layer.update(keys * float("nan"), values)
    assert of_layer.record_past
