"""Left-padded rows: their first real tokens are the ones that stay exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from cache_helpers import model_of, preset_of, random_kv, stream_compressor, tokens
from kvlathe import CompressedDynamicCache, PaddingWarning, ShapeError, attach, detach
from kvlathe.cache.layer import CompressedLayer
from kvlathe.cache.layer_store import Policy
from kvlathe.cache.padding import PaddedRows, Padding
from kvlathe.errors import CacheStateError, NonFiniteError

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
    of_layer.padding_seen = ROWS
    of_layer.update(keys, values)
    return of_layer, keys


def test_layers_of_a_pass_share_what_is_made_of_its_mask() -> None:
    mask = (torch.rand(len(LENGTHS), 1, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.5).bool()
    ours, same, other = Padding(LENGTHS, N_SINKS), Padding(LENGTHS, N_SINKS), Padding([1] * 4, N_SINKS)
    first = ours.mask_of_slots(mask)
    assert same.mask_of_slots(mask) is first
    assert not torch.equal(other.mask_of_slots(mask), first)
    # Another mask, even with the same content.
    again = ours.mask_of_slots(mask.clone())
    assert again is not first and torch.equal(again, first)
    assert torch.equal(ours.mask_of_slots(~mask), ~first)


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
    seen = padding.mask_of_slots(mask(40)[:, None, None, :])
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
    of_layer.padding_seen = ROWS
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
    of_layer.padding_seen = PaddedRows((0, 30, 118), 120)
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
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), model=model)
    with pytest.raises(ShapeError, match="batch, tokens"):
        cache.note_padding(torch.ones(5))
    model(input_ids=tokens(9), past_key_values=cache)
    with pytest.raises(CacheStateError, match="first tokens"):
        cache.note_padding(torch.ones(1, 9))


@pytest.mark.parametrize("is_attached", [False, True])
def test_generate_with_padding(is_attached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded row writes what it writes alone: at many bits nothing but the place of its tokens differs."""
    model = model_of("llama")
    preset = preset_of("llama", bits=8.0)
    n_padding = 30
    alone, long = tokens(60, seed=1), tokens(90, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, n_padding, dtype=torch.long), alone], dim=1)])
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :n_padding] = 0
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    # Fewer than the padding and what follows it: `generate` has to take a longer first chunk.
    monkeypatch.setattr("kvlathe.attachment.PREFILL_CHUNK_TOKENS", 16)
    if is_attached:
        attach(model)
    try:
        cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16)
        if not is_attached:
            cache.note_padding(attention_mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PaddingWarning)
            both = model.generate(ids, attention_mask=attention_mask, past_key_values=cache, **common)
        single = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16)
        one = model.generate(alone, past_key_values=single, **common)
    finally:
        detach(model)
    assert torch.equal(both[1, -6:], one[0, -6:])
