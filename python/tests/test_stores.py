"""The native store against the torch one, both on the CPU with the same codecs, and users' own compressors."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cache_helpers import low_rank, one_layer_cache, random_kv, stream_compressor
from kvlathe import IdentityCompressor
from kvlathe.stores import Policy, Store, make_store
from kvlathe.stores.foreign import ForeignStore
from kvlathe.stores.native import NativeStore

HEADS, DIM = 2, 16
# Different sums may put a coefficient on the other side of a border, which moves it by one step of its quantiser.
_MOST_DIFFERENT = 0.005


def _compressors(kind: str) -> tuple[nn.Module, nn.Module]:
    return {
        "streams": lambda: (stream_compressor(side="key"), stream_compressor(side="value")),
        "long_blocks": lambda: (
            stream_compressor(side="key", block_len=32),
            stream_compressor(side="value", block_len=32),
        ),
        "low_rank": lambda: (low_rank(), low_rank(seed=5, bits=16)),
        "values_only": lambda: (IdentityCompressor(), low_rank()),
        "mixed": lambda: (stream_compressor(side="key"), low_rank()),
        "keys_only": lambda: (stream_compressor(side="key"), IdentityCompressor()),
        "identity": lambda: (IdentityCompressor(), IdentityCompressor()),
    }[kind]()


KINDS = ("streams", "long_blocks", "low_rank", "values_only", "mixed", "keys_only", "identity")


def _native(keys: nn.Module, values: nn.Module, policy: Policy, like: tuple[Tensor, Tensor]) -> NativeStore:
    store = make_store(keys, values, policy, *like)
    assert isinstance(store, NativeStore)
    return store


def read(store: Store) -> tuple[Tensor, Tensor]:
    return store.read(store.first, store.n_tokens, n_tokens=store.n_tokens)


def _stores(kind: str, policy: Policy, batch: int, dtype: torch.dtype = torch.float32) -> list[Store]:
    like = random_kv(0, batch=batch, heads=HEADS, dim=DIM, dtype=dtype)
    keys, values = _compressors(kind)
    return [make_store(keys, values, policy, *like), ForeignStore(keys, values, policy, *like)]


def _assert_alike(stores: list[Store]) -> None:
    native, torch_ = stores
    assert (native.n_tokens, native.n_coded, native.batch) == (torch_.n_tokens, torch_.n_coded, torch_.batch)
    for a, b in zip(read(native), read(torch_), strict=True):
        assert a.shape == b.shape
        if not a.numel():
            continue
        far = (a.float() - b.float()).abs() > 1e-4 * (1 + b.float().abs())
        if a.dtype != torch.float32:
            far = (a.float() - b.float()).abs() > 0.02 * (1 + b.float().abs())
        # A different code shows in all components of its token.
        assert float(far.any(-1).double().mean()) <= _MOST_DIFFERENT * DIM


# One step of a test: what to do, and with which number (how many tokens, or which rows).
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 45)),
        st.tuples(st.just("compress"), st.just(0)),
        st.tuples(st.just("crop"), st.integers(0, 60)),
        st.tuples(st.just("select"), st.integers(0, 10**6)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=25,
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    steps=_STEPS, n_sinks=st.sampled_from([0, 4]), start=st.sampled_from([0, 30]), n_tail=st.integers(0, 12)
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_random_histories_agree(
    kind: str, steps: list[tuple[str, int]], n_sinks: int, start: int, n_tail: int
) -> None:
    stores = _stores(kind, Policy(n_sinks, start, n_tail), batch=2)
    n_tokens, batch, seed = 0, 2, itertools.count()
    for action, number in steps:
        if action == "append":
            keys, values = random_kv(number, batch=batch, heads=HEADS, dim=DIM, seed=next(seed))
            for store in stores:
                store.append(keys, values)
            n_tokens += number
        elif action == "crop":
            removed = min(number, n_tokens)
            for store in stores:
                store.crop(removed)
            n_tokens -= removed
        elif action == "select":
            new_batch = number % 4 + 1
            rows = [(number // 4 + 7 * i * number) % batch for i in range(new_batch)]
            for store in stores:
                store.select(rows)
            batch = new_batch
        elif action == "copy":
            # The originals are changed and forgotten; copies must not notice.
            copies = [store.copy() for store in stores]
            for store in stores:
                store.append(*random_kv(9, batch=batch, heads=HEADS, dim=DIM))
                store.compress()
                store.crop(store.n_tokens // 2)
            stores = copies
        else:
            for store in stores:
                store.compress()
        assert stores[0].n_tokens == n_tokens
        assert stores[0].batch == batch
        _assert_alike(stores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_contents_agree_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    stores = _stores(kind, Policy(4, 0, 8), batch=2, dtype=dtype)
    keys, values = random_kv(150, batch=2, heads=HEADS, dim=DIM, dtype=dtype)
    for store in stores:
        for part in zip(keys.split(50, dim=2), values.split(50, dim=2), strict=True):
            store.append(*part)
            store.compress()
    _assert_alike(stores)
    for store in stores:
        held_keys, held_values = read(store)
        assert held_keys.dtype == held_values.dtype == dtype
        assert torch.equal(held_keys[:, :, :4], keys[:, :, :4])
        assert torch.equal(held_keys[:, :, -8:], keys[:, :, -8:])


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_nothing(n_threads: int) -> None:
    keys, values = random_kv(300, batch=3, heads=HEADS, dim=DIM)
    policy = Policy(4, 0, 8)
    contents = []
    before = torch.get_num_threads()
    try:
        for n in (1, n_threads):
            torch.set_num_threads(n)
            store = _native(*_compressors("streams"), policy, (keys, values))
            store.append(keys, values)
            store.compress()
            contents.append(read(store))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*contents, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_read_leaves_room(kind: str) -> None:
    keys, values = random_kv(50, heads=HEADS, dim=DIM)
    for store in _stores(kind, Policy(4, 0, 8), batch=1):
        store.append(keys, values)
        store.compress()
        for roomy, tight in zip(store.read(0, 50, n_tokens=50, room=3), read(store), strict=True):
            assert roomy.shape[2] == 53
            assert torch.equal(roomy[:, :, :50], tight)


@pytest.mark.parametrize("make_view", [
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    lambda t: torch.cat([t, t], dim=-1)[..., :DIM],
    lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    lambda t: torch.cat([t, t], dim=2)[:, :, : t.shape[2]],
], ids=["heads_inner", "wide_rows", "column_major", "part_of_longer"])  # fmt: skip
@pytest.mark.parametrize("kind", ["streams", "low_rank", "identity"])
def test_strided_tensors_are_read_rightly(kind: str, make_view: Callable[[Tensor], Tensor]) -> None:
    keys, values = random_kv(40, batch=2, heads=HEADS, dim=DIM)
    plain, strided = (_stores(kind, Policy(4, 0, 8), batch=2) for _ in range(2))
    for a, b in zip(plain, strided, strict=True):
        a.append(keys, values)
        b.append(make_view(keys), make_view(values))
        a.compress()
        b.compress()
        for x, y in zip(read(a), read(b), strict=True):
            assert torch.equal(x, y)


def test_which_store_is_taken() -> None:
    streams, policy = _compressors("streams"), Policy(4, 0, 0)
    like = random_kv(0)
    assert isinstance(make_store(*streams, policy, *like), NativeStore)
    assert isinstance(make_store(*streams, policy, *(t.to("meta") for t in like)), ForeignStore)
    assert isinstance(make_store(streams[0], Halves(), policy, *like), ForeignStore)
    assert isinstance(
        make_store(*_compressors("low_rank"), policy, *(t.double() for t in like)), ForeignStore
    )


def test_the_torch_store_keeps_no_part_of_the_models_tensors() -> None:
    """An empty view would keep the whole prompt alive."""
    keys, values = random_kv(500)
    store = ForeignStore(IdentityCompressor(), Halves(), Policy(0, 0, 0), keys, values)
    store.append(keys, values)
    store.compress()
    given = {t.untyped_storage().data_ptr() for t in (keys, values)}
    for side in store._sides:
        for held in (side.sinks, side.tail):
            assert held.untyped_storage().data_ptr() not in given


# Users' own compressors.


class Halves(nn.Module):
    """Stores float16."""

    def compress(self, x: Tensor) -> Tensor:
        return x.half()

    def expand(self, coded: Tensor) -> Tensor:
        return coded.float()


class ScaledBytes(nn.Module):
    """Stores a dict: codes, one scale a vector, and something that is no tensor."""

    def compress(self, x: Tensor) -> dict[str, Any]:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return {"codes": (x / scale).round().to(torch.int8), "scale": scale, "note": "int8"}

    def expand(self, coded: dict[str, Any]) -> Tensor:
        assert coded["note"] == "int8"
        return coded["codes"].float() * coded["scale"]


Pair = namedtuple("Pair", ["low", "high"])


class NamedPair(nn.Module):
    """Stores a namedtuple."""

    def compress(self, x: Tensor) -> Pair:
        low = x.bfloat16()
        return Pair(low, (x - low.float()).bfloat16())

    def expand(self, coded: Pair) -> Tensor:
        return coded.low.float() + coded.high.float()


class HeadsFirst(nn.Module):
    """Stores [heads, batch, tokens, dim]: the leading dimension is not the batch, though it may be as long."""

    def compress(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).half()

    def expand(self, coded: Tensor) -> Tensor:
        return coded.transpose(0, 1).float()


class Flat(nn.Module):
    """Stores one long vector and the shape."""

    def compress(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        return x.half().flatten(), x.shape

    def expand(self, coded: tuple[Tensor, torch.Size]) -> Tensor:
        return coded[0].float().view(coded[1])


@dataclass
class Box:
    codes: Tensor


class Boxed(nn.Module):
    """Stores an object that nobody else can look into."""

    def compress(self, x: Tensor) -> Box:
        return Box(x.half())

    def expand(self, coded: Box) -> Tensor:
        return coded.codes.float()


USER_COMPRESSORS = [Halves, ScaledBytes, NamedPair, HeadsFirst, Flat, Boxed]


@pytest.mark.parametrize("user", USER_COMPRESSORS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_users_compressors_through_the_cache(user: Callable[[], nn.Module], batch: int) -> None:
    cache = one_layer_cache(user(), user(), tail=10)
    keys, values = random_kv(130, batch=batch)
    for part in zip(keys.split(13, dim=2), values.split(13, dim=2), strict=True):
        given_keys, given_values = cache.update(*part, 0)
        assert torch.equal(given_keys[:, :, -13:], part[0])
        assert torch.equal(given_values[:, :, -13:], part[1])
    stats = cache.get_memory_stats()
    assert stats["seq_len"] == 130
    assert stats["compressed_tokens"] == (130 - 10) // 32 * 32

    def assert_holds(expected_keys: Tensor, expected_values: Tensor) -> None:
        layer = cache.layers[0]
        for held, expected in ((layer.keys, expected_keys), (layer.values, expected_values)):
            assert held.shape == expected.shape
            assert held.dtype == expected.dtype
            torch.testing.assert_close(held, expected, rtol=0.01, atol=0.03)

    assert_holds(keys, values)
    rows = torch.tensor([batch - 1, 0, batch - 1, 0])
    cache.reorder_cache(rows)
    keys, values = keys[rows], values[rows]
    assert_holds(keys, values)
    cache.batch_repeat_interleave(2)
    keys, values = keys.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)
    assert_holds(keys, values)
    cache.crop(-60)  # into the third run
    assert cache.get_seq_length() == 70
    keys, values = keys[:, :, :70], values[:, :, :70]
    assert_holds(keys, values)
    cache.batch_select_indices(torch.tensor([3, 0]))
    keys, values = keys[[3, 0]], values[[3, 0]]
    assert_holds(keys, values)
    more = random_kv(40, batch=2, seed=9)
    cache.update(*more, 0)
    assert_holds(torch.cat([keys, more[0]], dim=2), torch.cat([values, more[1]], dim=2))


def test_a_user_compressor_sees_each_token_once() -> None:
    """Nothing is compressed twice as long as nothing is rolled back."""

    class Counting(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.n_tokens = 0

        def compress(self, x: Tensor) -> Tensor:
            self.n_tokens += x.shape[2]
            return super().compress(x)

    counting = Counting()
    cache = one_layer_cache(IdentityCompressor(), counting)
    keys, values = random_kv(200)
    for at in range(200):
        cache.update(keys[:, :, at : at + 1], values[:, :, at : at + 1], 0)
    assert counting.n_tokens == cache.get_memory_stats()["compressed_tokens"] == 192
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("block_len", [8, 32, 64])
@pytest.mark.parametrize("other", [Halves, ScaledBytes])
def test_a_users_compressor_next_to_ours(other: Callable[[], nn.Module], block_len: int) -> None:
    cache = one_layer_cache(stream_compressor(block_len=block_len), other(), tail=5)
    keys, values = random_kv(200)
    for part in zip(keys.split(21, dim=2), values.split(21, dim=2), strict=True):
        cache.update(*part, 0)
    layer = cache.layers[0]
    assert (4 + layer.n_coded) % max(block_len, 32) == 0
    assert layer.n_coded >= 200 - 4 - 5 - 64
    torch.testing.assert_close(layer.values, values, rtol=0.01, atol=0.02)
    assert float((layer.keys - keys).norm() / keys.norm()) < 0.1
    expected = one_layer_cache(stream_compressor(block_len=block_len), IdentityCompressor(), tail=5)
    expected.update(keys, values, 0)
    n = layer.n_coded
    torch.testing.assert_close(layer.keys[:, :, :n], expected.layers[0].keys[:, :, :n], rtol=1e-4, atol=1e-4)


def test_a_subclass_computes_what_it_says() -> None:
    """A subclass of ours may change anything, so it must not be replaced by the native code."""

    class Zeros(IdentityCompressor):
        def expand(self, coded: Tensor) -> Tensor:
            return torch.zeros_like(coded)

    cache = one_layer_cache(IdentityCompressor(), Zeros())
    cache.update(*random_kv(64), 0)
    assert not cache.layers[0].values.any()
    assert cache.layers[0].keys.all()
