"""Layers with a sliding window, without a model: what they show, what they hold, what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.cache_utils import DynamicSlidingWindowLayer

from cache_helpers import low_rank, random_kv, stream_compressor
from kvlathe import CompressedDynamicCache, IdentityCompressor
from kvlathe.cache.layer import CompressedLayer
from kvlathe.errors import ResourceError, RollbackError, ShapeError
from kvlathe.stores import Policy, Store
from kvlathe.stores.foreign import ForeignStore

WINDOW = 60


class _Halves(nn.Module):
    """A user's own: half precision, an opaque stored form."""

    def compress(self, x: Tensor) -> dict[str, Any]:
        return {"half": x.half()}

    def expand(self, coded: dict[str, Any]) -> Tensor:
        return coded["half"].float()


# name -> (compressors, largest error of what comes back)
KINDS: dict[str, tuple[Callable[[str], nn.Module], float]] = {
    "identity": (lambda _: IdentityCompressor(), 0.0),
    "streams": (lambda side: stream_compressor(bits=8.0, side=side), 0.2),
    "low_rank": (lambda _: low_rank(rank=16), 0.1),
    "keys_in_blocks": (
        lambda side: stream_compressor(bits=8.0, side="key") if side == "key" else IdentityCompressor(),
        0.2,
    ),
    "values_by_rank": (
        lambda side: stream_compressor(bits=8.0, side="key") if side == "key" else low_rank(rank=16),
        0.2,
    ),
    # As on a GPU.
    "streams_in_torch": (lambda side: stream_compressor(bits=8.0, side=side), 0.2),
    "low_rank_in_torch": (lambda _: low_rank(rank=16), 0.1),
    "users": (lambda _: _Halves(), 2e-3),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class _InTorch(CompressedLayer):
    def _new_store(self, key_states: Tensor, value_states: Tensor) -> Store:
        return ForeignStore(self._k_compressor, self._v_compressor, self.policy, key_states, value_states)


def make(kind: str, window: int = WINDOW, tail: int = 8) -> CompressedLayer:
    compressor, _ = KINDS[kind]
    layer = _InTorch if kind.endswith("in_torch") else CompressedLayer
    return layer(compressor("key"), compressor("value"), Policy(4, 0, tail, window))


def close(kind: str, given: Tensor, expected: Tensor) -> bool:
    limit = KINDS[kind][1]
    return given.shape == expected.shape and float((given - expected).abs().max()) <= limit


@pytest.mark.parametrize("steps", [[1] * 130, [7] * 18, [100, 1, 1, 50, 1], [59, 1, 1, 1, 90], [60, 61, 80]])
def test_it_shows_what_the_stock_layer_shows(kind: str, steps: list[int]) -> None:
    layer, stock = make(kind), DynamicSlidingWindowLayer(WINDOW)
    keys, values = random_kv(sum(steps), batch=2)
    at = 0
    for step in steps:
        part = slice(at, at + step)
        assert layer.get_mask_sizes(step) == stock.get_mask_sizes(step)
        given = layer.update(keys[:, :, part], values[:, :, part])
        expected = stock.update(keys[:, :, part], values[:, :, part])
        for ours, theirs in zip(given, expected, strict=True):
            assert close(kind, ours, theirs)
            # The newest tokens are exact whatever the rest is.
            assert torch.equal(ours[:, :, -step:], theirs[:, :, -step:])
        at += step
        assert layer.get_seq_length() == stock.get_seq_length() == at
    assert close(kind, layer.keys, stock.keys) and close(kind, layer.values, stock.values)
    if kind != "identity":
        assert 0 < layer.n_coded <= WINDOW + 32


def test_what_it_holds_stops_growing(kind: str) -> None:
    layer = make(kind)
    keys, values = random_kv(2000)
    held = []
    for part_keys, part_values in zip(keys.split(20, dim=2), values.split(20, dim=2), strict=True):
        layer.update(part_keys, part_values)
        held.append(sum(layer.memory_use()))
    # A window, and up to a block (of the user's compressor: a run of 32 tokens) that is not yet out of it entirely.
    assert max(held) <= (WINDOW + 32) * 2 * 2 * 16 * 4
    assert max(held[5:20]) == max(held[-20:])
    exact = (WINDOW - 1) * 2 * 2 * 16
    assert layer.values_held() == (exact, 4 * exact)


def test_the_prompts_tensor_is_not_kept_alive() -> None:
    layer = make("identity")
    layer.update(*random_kv(4000))
    assert layer.keys is not None
    # Keys and values of 2 heads; up to 15 tokens leave later, and native memory has room for 32 more.
    assert sum(layer.memory_use()) <= (WINDOW + 15 + 32) * 2 * 2 * 16 * 4


def test_rollback_after_recording(kind: str) -> None:
    layer = make(kind)
    keys, values = random_kv(100)
    layer.update(keys[:, :, :80], values[:, :, :80])
    layer.activate_past_recording()
    reference = copy.deepcopy(layer)
    wrong = random_kv(9, seed=1)
    layer.update(*wrong)
    layer.crop(-9)
    assert layer.get_seq_length() == 80
    rest = (keys[:, :, 80:], values[:, :, 80:])
    for ours, expected in zip(layer.update(*rest), reference.update(*rest), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_many_steps_before_a_rollback(kind: str) -> None:
    """All that is recorded stays until `crop` is called."""
    layer = make(kind)
    keys, values = random_kv(200)
    layer.activate_past_recording()
    for part in (slice(0, 60), slice(60, 130), slice(130, 200)):
        layer.update(keys[:, :, part], values[:, :, part])
    layer.crop(-100)
    assert layer.get_seq_length() == 100
    assert close(kind, layer.keys, keys[:, :, 100 - WINDOW + 1 : 100])
    with pytest.raises(RollbackError, match="window of 60"):
        layer.crop(-60)
    assert layer.get_seq_length() == 100


@pytest.mark.parametrize("n_removed", [40, 100])
def test_everything_can_be_removed(kind: str, n_removed: int) -> None:
    layer = make(kind)
    layer.update(*random_kv(40))
    layer.crop(-n_removed)
    assert layer.get_seq_length() == 0
    keys, values = random_kv(30, seed=1)
    assert torch.equal(layer.update(keys, values)[0], keys)


def test_rows_are_selected_and_copies_are_apart(kind: str) -> None:
    layer = make(kind)
    keys, values = random_kv(100, batch=3)
    layer.update(keys, values)
    twin = copy.deepcopy(layer)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert close(kind, layer.keys, keys[[2, 2, 0], :, -WINDOW + 1 :])
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == 6
    assert close(kind, twin.keys, keys[:, :, -WINDOW + 1 :])
    twin.update(*random_kv(30, batch=3))
    assert (twin.get_seq_length(), layer.get_seq_length()) == (130, 100)


def test_a_window_of_one_token_sees_no_past() -> None:
    layer = make("identity", window=1)
    for seed in range(3):
        keys, values = random_kv(1, seed=seed)
        assert layer.get_mask_sizes(1) == (1, seed)
        assert torch.equal(layer.update(keys, values)[0], keys)
    with pytest.raises(ShapeError, match="sliding_window is 0"):
        make("identity", window=0)


@pytest.mark.parametrize("kind", ["streams", "streams_in_torch"])
def test_sinks_are_exact_while_they_are_in_the_window(kind: str) -> None:
    layer = make(kind, tail=8)
    keys, values = random_kv(120)
    layer.update(keys[:, :, :50], values[:, :, :50])
    assert layer.n_coded > 0
    assert torch.equal(layer.keys[:, :, :4], keys[:, :, :4])
    layer.update(keys[:, :, 50:61], values[:, :, 50:61])
    # 59 of 61 tokens are still seen: two sinks have left.
    assert torch.equal(layer.keys[:, :, :2], keys[:, :, 2:4])
    layer.update(keys[:, :, 61:], values[:, :, 61:])
    assert not torch.equal(layer.keys[:, :, :1], keys[:, :, 61:62])
    assert close(kind, layer.keys, keys[:, :, 61:])


def test_a_window_that_cannot_go_back_leaves_all_layers_as_they_are() -> None:
    """A pass that broke off behind a full layer and a window that has dropped what a shorter sequence would see."""
    config = Qwen2Config(
        num_hidden_layers=3,
        sliding_window=24,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    exact = [IdentityCompressor()] * 3
    cache = CompressedDynamicCache(exact, exact, 3, config=config)
    keys, values = random_kv(80)
    for layer in range(3):
        cache.update(keys[:, :, :40], values[:, :, :40], layer)
    for layer in range(2):
        cache.update(keys[:, :, 40:], values[:, :, 40:], layer)
    with pytest.raises(RollbackError, match="window of 24"):
        cache.crop(0)
    assert [layer.get_seq_length() for layer in cache.layers] == [80, 80, 40]


def test_after_recording_a_window_forgets_again(kind: str) -> None:
    layer = make(kind)
    keys, values = random_kv(200)
    layer.activate_past_recording()
    layer.update(keys[:, :, :150], values[:, :, :150])
    assert layer._store.first == 0
    # As transformers does behind a loop that looked ahead.
    layer.record_past = False
    layer.update(keys[:, :, 150:], values[:, :, 150:])
    assert layer._store.first > 200 - WINDOW - 32


@pytest.mark.parametrize("n_new", [7, 90])
def test_a_step_that_memory_refuses_can_be_tried_again(
    kind: str, n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(kind)
    keys, values = random_kv(100 + n_new)
    layer.update(keys[:, :, :100], values[:, :, :100])
    twin = copy.deepcopy(layer)
    new = (keys[:, :, 100:], values[:, :, 100:])

    def refuse(store: Store) -> None:
        raise ResourceError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(layer._store), "settle", refuse)
        with pytest.raises(ResourceError):
            layer.update(*new)
    assert layer.get_seq_length() == 100
    for ours, expected in zip(layer.update(*new), twin.update(*new), strict=True):
        assert torch.equal(ours, expected)
