"""Saved caches that were damaged, or written by somebody else: refused when they are loaded, with an error of ours."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_helpers import low_rank, preset_of, random_kv, stream_compressor
from kvlathe import (
    BlockError,
    CompressedDynamicCache,
    DeviceError,
    DtypeError,
    IdentityCompressor,
    KvlatheError,
    NonFiniteError,
    PicklingError,
    PresetError,
    ShapeError,
)
from kvlathe.cache.layer import CompressedLayer
from kvlathe.saved import import_kvlathe_first
from kvlathe.stores import Policy
from kvlathe.stores.foreign import ForeignStore


class Halves(nn.Module):
    """A user's compressor."""

    def compress(self, x: Tensor) -> Tensor:
        return x.half()

    def expand(self, coded: Tensor) -> Tensor:
        return coded.float()


def _layer(kind: str) -> CompressedLayer:
    compressors: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
        "blocks": lambda: (stream_compressor(), stream_compressor(side="value")),
        "rank": lambda: (IdentityCompressor(), low_rank()),
        "user": lambda: (Halves(), IdentityCompressor()),
    }
    layer = CompressedLayer(*compressors[kind](), Policy(4 if kind == "blocks" else 0, 0, 9))
    layer.update(*random_kv(150, batch=2))
    return layer


KINDS = ("blocks", "rank", "user")

Change = Callable[[list[Any]], object]


class _Forger(pickle.Pickler):
    """Writes what it is given, with the data of one maker changed. Data are changed in place, as a list."""

    def __init__(self, file: io.BytesIO, name: str, change: Change) -> None:
        super().__init__(file)
        self.name, self.change, self.n_changed = name, change, 0

    def reducer_override(self, thing: Any) -> Any:
        reduce = getattr(type(thing), "__reduce__", None)
        if isinstance(thing, type) or reduce in (None, object.__reduce__):
            return NotImplemented
        reduced = thing.__reduce_ex__(2) if isinstance(thing, nn.Module) else thing.__reduce__()
        if reduced[0] is not import_kvlathe_first or reduced[1][0] != self.name:
            return NotImplemented
        data = list(reduced[1][1:])
        self.change(data)
        self.n_changed += 1
        return import_kvlathe_first, (self.name, *data)


def forged(thing: Any, name: str, change: Change) -> bytes:
    file = io.BytesIO()
    forger = _Forger(file, name, change)
    forger.dump(thing)
    assert forger.n_changed
    return file.getvalue()


def put(at: int, new: Any) -> Change:
    """Another value in one place; a function is given what was there."""

    def change(data: list[Any]) -> None:
        data[at] = new(data[at]) if isinstance(new, FunctionType) else new

    return change


def run(*fields: Any) -> Change:
    """Other fields of the only, or first, run; None leaves one as it is."""

    def change(data: list[Any]) -> None:
        old, *later = data[2]
        changed = [
            new(was) if callable(new) else was if new is None else new
            for was, new in zip(old, fields, strict=True)
        ]
        data[2] = [tuple(changed), *later]

    return change


# Of each: what is saved, the maker, how its data are changed, and what the loader says.
FORGERIES: dict[str, tuple[str, str, Change, type[Exception]]] = {
    # A layer: class, compressors, policy, device, contents, notes.
    "negative sinks": ("blocks", "layer", put(3, (-4, 0, 9, None)), ShapeError),
    "other sinks": ("blocks", "layer", put(3, (2, 0, 9, None)), ShapeError),
    "negative tail": ("blocks", "layer", put(3, (4, 0, -9, None)), ShapeError),
    "negative start": ("blocks", "layer", put(3, (4, -1, 9, None)), ShapeError),
    "half a token": ("blocks", "layer", put(3, (4, 0, 9.5, None)), ShapeError),
    "endless tail": ("blocks", "layer", put(3, (4, 0, 1 << 80, None)), ShapeError),
    "no window": ("blocks", "layer", put(3, (4, 0, 9, 0)), ShapeError),
    "half a policy": ("blocks", "layer", put(3, (4, 0)), PicklingError),
    "no policy": ("blocks", "layer", put(3, None), PicklingError),
    "no device": ("blocks", "layer", put(4, "cpu"), DeviceError),
    "no compressor": ("blocks", "layer", put(1, None), PresetError),
    "other compressor": ("blocks", "layer", put(1, IdentityCompressor()), KvlatheError),
    "another's class": ("blocks", "layer", put(0, dict), PicklingError),
    "nothing": ("blocks", "layer", lambda data: data.clear(), PicklingError),
    "other dtypes": (
        "blocks", "layer", put(5, lambda held: (held[0], (torch.float64, torch.float32))), DtypeError,
    ),
    "one dtype": ("blocks", "layer", put(5, lambda held: (held[0], (torch.float32,))), PicklingError),
    "no parts": ("blocks", "layer", put(5, (None, (torch.float32,) * 2)), KvlatheError),
    "noted padding": ("blocks", "layer", put(6, (False, False, False, [3, 4])), ShapeError),
    # A compressor: digest, layer, side, sinks.
    "other preset": ("blocks", "stream set", put(0, "0" * 64), PresetError),
    "no preset": ("blocks", "stream set", put(0, 7), PicklingError),
    "other layer": ("blocks", "stream set", put(1, 1), BlockError),
    "no such layer": ("blocks", "stream set", put(1, 99), ShapeError),
    "negative layer": ("blocks", "stream set", put(1, -1), PicklingError),
    "no such side": ("blocks", "stream set", put(2, "both"), ShapeError),
    "negative sinks of a codec": ("blocks", "stream set", put(3, -1), ShapeError),
    # A side with blocks: first, sinks, name, positions, packed, tail.
    "blocks of another preset": (
        "blocks", "side", put(2, lambda name: ("0" * 64, *name[1:])), BlockError,
    ),
    "half a name": ("blocks", "side", put(2, ("key",)), PicklingError),
    "one position less": ("blocks", "side", put(3, lambda positions: positions[:-1]), PicklingError),
    "other positions": ("blocks", "side", put(3, lambda positions: [n + 8 for n in positions]), BlockError),
    "shorter blocks": ("blocks", "side", put(4, lambda packed: packed[..., :-1]), BlockError),
    "fewer rows": ("blocks", "side", put(4, lambda packed: packed[:1]), ShapeError),
    "blocks of numbers": ("blocks", "side", put(4, lambda packed: packed.float()), DtypeError),
    "NaN in the tail": ("blocks", "side", put(5, lambda tail: tail / 0), NonFiniteError),
    "shorter tail of one side": (
        "blocks", "parts", put(1, lambda value: replace(value, tail=value.tail[:, :, 1:])), ShapeError,
    ),
    # A side with runs: first, sinks, runs, tail.
    "run at another position": ("rank", "runs", run(8, None, None), BlockError),
    "longer run": ("rank", "runs", run(None, 99, None), ShapeError),
    "empty run": ("rank", "runs", run(None, 0, None), BlockError),
    "negative run": ("rank", "runs", run(None, -1, None), BlockError),
    "run of other vectors": ("rank", "runs", run(None, None, lambda data: data[..., :-1]), KvlatheError),
    "run of other heads": ("rank", "runs", run(None, None, lambda data: data[:, :1]), ShapeError),
    "run of other rows": ("rank", "runs", run(None, None, lambda data: data[:1]), ShapeError),
    "run of other numbers": ("rank", "runs", run(None, None, lambda data: data.float()), KvlatheError),
    "run of nothing": ("rank", "runs", run(None, None, lambda data: None), PicklingError),
    "two runs": ("rank", "runs", put(2, lambda runs: [*runs, (runs[0][1], *runs[0][1:])]), ShapeError),
    "no runs": ("rank", "runs", put(2, None), PicklingError),
    "run twice": ("user", "runs", put(2, lambda runs: [runs[0], *runs]), BlockError),
    "run missing": ("user", "runs", put(2, lambda runs: runs[:1] + runs[2:]), BlockError),
    "first run missing": ("user", "runs", put(2, lambda runs: runs[1:]), BlockError),
    "last run missing": ("user", "runs", put(2, lambda runs: runs[:-1]), ShapeError),
    "run of fewer tokens": ("user", "runs", run(None, None, lambda data: data[:, :, 1:]), ShapeError),
    "run of fewer rows": ("user", "runs", run(None, None, lambda data: data[:1]), ShapeError),
    "tail of other rows": ("user", "runs", put(3, lambda tail: tail[:1]), ShapeError),
    "tail of other numbers": ("user", "runs", put(3, lambda tail: tail.double()), DtypeError),
    "first before the start": ("user", "runs", put(0, -32), ShapeError),
    "runs for blocks": ("blocks", "layer", put(5, lambda held: (_parts_of("rank"), held[1])), KvlatheError),
    "runs of another compressor": ("user", "layer", put(5, lambda held: (_parts_of("rank"), held[1])), KvlatheError),
    "low rank of other numbers": ("rank", "low rank", put(0, lambda U: U * 2), PresetError),
    "low rank of other bits": ("rank", "low rank", put(2, 7), ShapeError),
    "low rank of a tensor for a dtype": ("rank", "low rank", put(3, torch.zeros(1)), DtypeError),
    "low rank of no dtype": ("rank", "low rank", put(3, "float16"), KvlatheError),
}  # fmt: skip


def _parts_of(kind: str) -> Any:
    return _layer(kind).__reduce__()[1][6][0]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_layer_is_refused(name: str) -> None:
    kind, maker, change, error = FORGERIES[name]
    preset = preset_of("llama")
    content = forged(_layer(kind), maker, change)
    with pytest.raises(error) as caught:
        pickle.loads(content)
    assert isinstance(caught.value, KvlatheError) and len(str(caught.value)) > 30
    assert preset.digest


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_forgery_is_the_layer(kind: str) -> None:
    """What the others are refused for is their change."""
    layer = _layer(kind)
    twin = pickle.loads(forged(layer, "layer", lambda data: None))
    assert torch.equal(twin.keys, layer.keys) and torch.equal(twin.values, layer.values)


def _padded() -> CompressedDynamicCache:
    cache = CompressedDynamicCache([stream_compressor()], [stream_compressor(side="value")], num_layers=1)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    cache.note_padding(mask)
    return cache


@pytest.mark.parametrize(
    ("maker", "change"),
    [
        ("padding", put(0, (7, 0, 0))),
        ("padding", put(0, (-7, 0))),
        ("padding", put(0, (57, 0))),
        ("padding", put(0, (1 << 60, 0))),
        ("padding", put(0, ())),
        ("padding", put(0, None)),
        ("padding", put(0, ("7", 0))),
        ("padding", put(1, 0)),
        ("padding", put(1, 5)),
        ("padding", put(1, -4)),
        ("padded rows", put(0, (-1, 0))),
        ("padded rows", put(0, (1.5, 0))),
        ("padded rows", put(1, -60)),
        ("cache", put(1, [])),
        ("cache", put(1, [3])),
        ("cache", put(1, None)),
        ("cache", put(2, None)),
        ("cache", put(2, {})),
        ("cache", put(2, {"compress_start_len": -1, "uncompressed_tail": 0})),
        ("cache", put(0, dict)),
        ("cache", lambda data: data.append(1)),
    ],
)
def test_a_forged_cache_is_refused(maker: str, change: Change) -> None:
    cache = _padded()
    if maker == "padding":
        cache.update(*random_kv(60, batch=2), 0)
        assert cache.layers[0].padding is not None
    with pytest.raises(KvlatheError):
        pickle.loads(forged(cache, maker, change))


@pytest.mark.parametrize("name", ["nothing", "", None, ["cache"], 3])
def test_an_unknown_maker_is_an_error_of_ours(name: Any) -> None:
    with pytest.raises(PicklingError, match=r"does not know|damaged"):
        import_kvlathe_first(name)


def _odd() -> Iterator[Any]:
    yield from (None, True, -1, 1 << 70, 1.5, float("nan"), "", "key", b"", [], {}, (), object)
    yield from (torch.zeros(0), torch.zeros(2, 2, 3, 16), torch.zeros(1, dtype=torch.uint8), torch.float64)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_stands_in_a_field_nothing_but_our_errors_come(
    kind: str, foreign: bool, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """And what is loaded all the same can be used, or says with an error of ours why not."""
    if foreign:
        monkeypatch.setattr("kvlathe.cache.layer.make_store", ForeignStore)
    layer = _layer(kind)
    makers: dict[str, int] = {}

    def note(name: str) -> Change:
        return lambda data: makers.__setitem__(name, len(data))

    for name in ("layer", "stream set", "low rank", "side", "runs", "parts"):
        try:
            forged(layer, name, note(name))
        except AssertionError:
            continue
    n_refused = n_loaded = 0
    for name, n_fields in makers.items():
        for at in range(n_fields):
            for odd in _odd():
                content = forged(layer, name, lambda data, at=at, odd=odd: data.__setitem__(at, odd))
                try:
                    twin = pickle.loads(content)
                    twin.update(*random_kv(40, batch=2))
                    n_loaded += 1
                except KvlatheError:
                    n_refused += 1
    # An empty layer is one without contents, for example; and positions mean nothing without blocks.
    assert n_refused > 8 * n_loaded
    record_property("damaged files", n_refused)
