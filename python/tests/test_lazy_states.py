"""Lazy keys and values to everybody but SDPA: ordinary tensors, whatever comes first and whenever it comes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_helpers import compressed_cache, model_of, random_kv, tokens
from kvlathe import CacheStateError, ExpandedWarning, ResourceError
from kvlathe.lazy import LazyStates
from kvlathe.stores.native import NativeStore
from test_lazy_sdpa import Pair, queries_of

pytestmark = pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")

READERS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda states: torch.from_numpy(states.numpy().copy()),
    "tolist": lambda states: torch.tensor(states.tolist()),
    "item": lambda states: states[0, 1, 2, 3].item(),
    "to": lambda states: states.to(torch.float64),
    "float": lambda states: states.half().float(),
    "cat": lambda states: torch.cat([states, states], dim=2),
    "stack": lambda states: torch.stack([states, states]),
    "matmul": lambda states: torch.matmul(states, states.transpose(2, 3)),
    "@": lambda states: states @ states.mT,
    "einsum": lambda states: torch.einsum("bhtd,bhsd->bhts", states, states),
    "slice": lambda states: states[:, :, -3:],
    "tokens first": lambda states: states[:, :, :5],
    "index": lambda states: states[:, [1, 0]],
    "permute": lambda states: states.permute(0, 2, 1, 3),
    "reshape": lambda states: states.reshape(-1, states.shape[-1]),
    "merge batch": lambda states: states.view(-1, *states.shape[2:]),
    "iter": lambda states: torch.stack(list(states)),
    "unbind": lambda states: torch.stack(states.unbind(1)),
    "chunk": lambda states: states.chunk(2, dim=1)[1],
    "arithmetic": lambda states: 2 * states + states / 3 - 1,
    "comparison": lambda states: states > 0,
    "sum": lambda states: states.sum(),
    "out": lambda states: torch.add(states, 1, out=torch.empty(states.shape)),
    "copy_": lambda states: torch.empty(states.shape).copy_(states),
    "clone": lambda states: states.clone(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda states: pickle.loads(pickle.dumps(states)),
    "save": lambda states: _saved(states),
    "dlpack": torch.from_dlpack,
    "as_strided": lambda states: states.as_strided((2,), (1,)),
    "reshape by name": lambda states: states.reshape(shape=(states.shape[0], -1, *states.shape[2:])) + 0,
    "expand by name": lambda states: states[:, :, None].expand(size=(-1, -1, 2, -1, -1)) + 0,
    "repeat by name": lambda states: states.repeat(repeats=(1, 2, 1, 1)) + 0,
    "flatten by name": lambda states: states[:, :, None].flatten(start_dim=1, end_dim=2) + 0,
    "linear": lambda states: F.linear(states, torch.eye(states.shape[-1])),
    "setitem": lambda states: _written(states),
    "mul_": lambda states: states.mul_(2),
    "vmap": lambda states: torch.vmap(lambda each: each * 2)(states),
}


def _saved(states: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file)


def _written(states: Tensor) -> Tensor:
    states[:, :, 0] = 7.0
    return states + 0


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield Pair(3)


@pytest.mark.parametrize("name", READERS)
def test_whatever_reads_them_meets_an_ordinary_tensor(name: str, pair: Pair) -> None:
    read = READERS[name]
    got, expected = read(pair.keys), read(pair.dense[0].clone())
    assert not isinstance(got, LazyStates)
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected) and type(got) is Tensor
    else:
        assert got == expected
    assert pair.expansions.n_layers == 1


def test_addresses_and_strides_are_of_real_memory(pair: Pair) -> None:
    repeated = pair.keys[:, :, None].expand(-1, -1, 3, -1, -1)
    assert isinstance(repeated, LazyStates)
    assert repeated.stride()[2] == 0 and repeated.data_ptr() == pair.keys.data_ptr() != 0
    assert pair.keys.untyped_storage().nbytes() == pair.dense[0].untyped_storage().nbytes()
    assert str(pair.keys) == str(pair.dense[0])


def test_what_tells_of_sizes_expands_nothing(pair: Pair) -> None:
    keys, dense = pair.keys, pair.dense[0]
    for tell in (
        lambda t: (t.shape, t.size(), t.size(-1), t.dim(), t.ndim, t.numel(), len(t), t.shape.numel()),
        lambda t: (t.dtype, t.device, t.layout, t.is_cpu, t.is_cuda, t.is_floating_point(), t.element_size()),
        lambda t: (
            t.requires_grad,
            t.is_leaf,
            t.grad_fn,
            t.grad,
            t.is_meta,
            torch.is_tensor(t),
            t.device.type,
        ),
    ):
        assert tell(keys) == tell(dense)
    assert pair.expansions.n_layers == 0 and isinstance(keys.detach(), LazyStates)


@pytest.mark.parametrize(
    "cast",
    [
        lambda states: states.to(states.device),
        lambda states: states.to(torch.zeros(1)),
        lambda states: states.to(device="cpu", dtype=torch.float32, non_blocking=True),
        lambda states: states.to(states),
        lambda states: states.type(torch.float32),
        lambda states: states.type_as(torch.zeros(1)),
        lambda states: states.float(),
        lambda states: states.cpu(),
    ],
)
def test_a_cast_to_what_they_are_is_none(cast: Callable[[Tensor], Tensor], pair: Pair) -> None:
    """Gemma 3n places the keys that layers share; torch gives back the tensor itself where it stands right."""
    dense = pair.dense[0]
    assert cast(dense) is dense and cast(pair.keys) is pair.keys
    assert pair.expansions.n_layers == 0
    assert torch.equal(pair.keys.to(torch.float32, copy=True), dense)
    assert pair.expansions.n_layers == 1


def test_calls_from_inside_of_torch_are_seen_too(pair: Pair) -> None:
    """Past `__torch_function__`: operators called by name, and from C++."""
    assert torch.equal(torch.ops.aten.add.Tensor(pair.keys, 1), pair.dense[0] + 1)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.add(pair.values, 1), pair.dense[1] + 1)


def test_both_are_expanded_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    read = NativeStore.read
    monkeypatch.setattr(NativeStore, "read", lambda *a, **k: calls.append(1) or read(*a, **k))
    for states in (pair.keys, pair.values, pair.keys, pair.keys.repeat(1, 2, 1, 1)):
        states.sum()
    assert len(calls) == 1


def test_what_somebody_wrote_to_them_counts_in_attention(pair: Pair) -> None:
    queries = queries_of(2, 3)
    keys, values = pair.dense
    pair.values.mul_(2)
    expected = F.scaled_dot_product_attention(queries, keys, 2 * values)
    assert torch.equal(F.scaled_dot_product_attention(queries, pair.keys, pair.values), expected)


def test_copies_made_of_them_do_not_change_with_them(pair: Pair) -> None:
    queries = queries_of(6, 3)
    keys, values = (states.repeat_interleave(3, 1) for states in (pair.keys, pair.values))
    pair.keys.zero_()
    dense = (states.repeat_interleave(3, 1) for states in pair.dense)
    expected = F.scaled_dot_product_attention(queries, *dense)
    assert torch.equal(F.scaled_dot_product_attention(queries, keys, values), expected)


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="to_dlpack asks for no memory that may be written to there"
)
def test_memory_is_not_reached_past_torchs_functions(pair: Pair) -> None:
    """There is none: an error, not a crash."""
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(pair.keys)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("first", ["attention", "expansion", "nothing"])
@pytest.mark.parametrize("later", ["append", "crop", "select", "reset", "settle"])
def test_kept_while_the_cache_goes_on(window: int | None, first: str, later: str) -> None:
    """They give what they stood for, by attention and expanded."""
    pair, queries = Pair(40, window=window), queries_of(2, 40)
    layer = pair.layer
    layer.record_past = later == "crop"  # a window would refuse to go back
    expected = F.scaled_dot_product_attention(queries, *pair.dense)
    if first == "attention":
        F.scaled_dot_product_attention(queries, pair.keys, pair.values)
    elif first == "expansion":
        pair.keys.sum()
    if later == "append":
        layer.update(*random_kv(50, batch=2, seed=5))
    elif later == "crop":
        layer.crop(-30)
    elif later == "select":
        layer.reorder_cache(torch.tensor([1, 1]))
    elif later == "reset":
        layer.reset()
    got = F.scaled_dot_product_attention(queries, pair.keys, pair.values)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(pair.keys.clone(), pair.dense[0]) and torch.equal(pair.values.clone(), pair.dense[1])


def test_without_memory_to_keep_them_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(40)

    def refuse(self: NativeStore) -> NativeStore:
        raise ResourceError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(NativeStore, "copy", refuse)
        pair.layer.update(*random_kv(50, batch=2, seed=5))
    with pytest.raises(CacheStateError, match=r"layer 0 handed out when it held 100 tokens.*clone\(\)"):
        pair.keys.sum()
    with pytest.raises(CacheStateError, match="gone on"):
        F.scaled_dot_product_attention(queries_of(2, 40), pair.keys, pair.values)


def test_they_are_gone_with_the_step() -> None:
    """Nothing of a pass stays with the cache: neither lazy tensors nor copies for them."""
    model, cache = model_of("llama"), compressed_cache("llama")
    with torch.no_grad():
        model(tokens(60), past_key_values=cache)
        for _ in range(9):
            model(tokens(1), past_key_values=cache)
    assert all(layer._handout is None or layer._handout() is None for layer in cache.layers)


def test_from_other_threads() -> None:
    pair, queries = Pair(3), queries_of(2, 3)
    expected = F.scaled_dot_product_attention(queries, *pair.dense)

    def look(which: int) -> bool:
        if which % 2:
            return torch.equal(pair.keys.clone(), pair.dense[0])
        got = F.scaled_dot_product_attention(queries, pair.keys, pair.values)
        return torch.allclose(got, expected, atol=2e-3, rtol=2e-3)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(32)))


def test_handed_to_another_layers_update() -> None:
    """As any tensors would be: the other layer copies what they stand for."""
    pair = Pair(3)
    other = Pair(1).layer
    other.update(pair.keys, pair.values)
    keys = other.keys
    assert keys is not None and torch.equal(keys[:, :, -4:], pair.dense[0][:, :, -4:])


def test_the_warning_names_the_operation_once() -> None:
    model = model_of("llama")
    cache = compressed_cache("llama")
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(tokens(60), past_key_values=cache)
        assert cache.get_memory_stats()["expanded_layers"] == 0
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        for _ in range(3):
            twin(tokens(1), past_key_values=cache)
        assert cache.get_memory_stats()["expanded_layers"] == 2
        model(tokens(1), past_key_values=cache)
        assert cache.get_memory_stats()["expanded_layers"] == 0
    (message,) = [str(each.message) for each in told if each.category is ExpandedWarning]
    assert "layer 0" in message and "Tensor.transpose" in message and "attn_implementation='sdpa'" in message
