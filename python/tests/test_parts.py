"""A layer's contents as values: exported, imported, and refused where they do not belong, by every store alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_helpers import expanded, low_rank, preset_of, random_kv, stream_compressor
from kvlathe import (
    Block,
    BlockError,
    CacheStateError,
    CompressedDynamicCache,
    DeviceError,
    DtypeError,
    IdentityCompressor,
    KvlatheError,
    LayerParts,
    NonFiniteError,
    ShapeError,
)
from kvlathe.cache.layer import CompressedLayer
from kvlathe.cache.padding import PaddedRows, Padding
from kvlathe.preset import Preset
from kvlathe.stores import Policy
from kvlathe.stores.foreign import ForeignStore


def layer_of(*, window: int | None = None, side: int = 0, tail: int = 9) -> CompressedLayer:
    sides = [stream_compressor(side=each, layer=side) for each in ("key", "value")]
    return CompressedLayer(*sides, Policy(4, 0, tail, window))


def filled(n_tokens: int = 100, **options: Any) -> CompressedLayer:
    layer = layer_of(**options)
    layer.update(*random_kv(n_tokens, batch=2))
    return layer


def test_blocks_are_named_and_not_copied() -> None:
    layer = filled()
    parts = layer.export_parts()
    digest = preset_of("llama").digest
    for side, of_side in (("key", parts.key), ("value", parts.value)):
        assert len(of_side.blocks) == 2
        for row in of_side.blocks:
            assert [block.first_position for block in row] == list(range(0, 88, 8))
            assert all((block.digest, block.layer, block.side) == (digest, 0, side) for block in row)
            assert all(block.data.dtype == torch.uint8 for block in row)
        again = layer.store.export(1, side)  # type: ignore[arg-type]
        assert again[3].data.data_ptr() == of_side.blocks[1][3].data.data_ptr()
        assert bytes(again[3]) == bytes(of_side.blocks[1][3].data.tolist())
        assert of_side.first == 0 and of_side.sinks.shape[2] == 4 and of_side.tail.shape[2] == 100 - 88
    # They outlive their layer.
    block, content = parts.key.blocks[0][0], bytes(parts.key.blocks[0][0])
    del layer, parts
    assert bytes(block) == content


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("n_tokens", [3, 10, 100])
def test_an_imported_layer_is_the_same(n_tokens: int, window: int | None) -> None:
    layer, twin = filled(n_tokens, window=window), layer_of(window=window)
    twin.import_parts(layer.export_parts())
    for step in range(3):
        new = random_kv(17, batch=2, seed=step)
        for ours, theirs in zip(layer.update(*new), twin.update(*new), strict=True):
            assert torch.equal(ours, theirs)
    if window is None:
        twin.crop(-5)
        layer.crop(-5)
    assert torch.equal(layer.keys, twin.keys)


def test_bytes_from_anywhere_are_attended_to_in_place(tmp_path: Path) -> None:
    """Blocks in a file that is mapped: attention reads them there, however often the layer is copied."""
    layer = filled()
    parts = layer.export_parts()
    path, packed = tmp_path / "blocks", [torch.stack([b.data for b in row]) for row in parts.key.blocks]
    path.write_bytes(b"".join(bytes(rows.flatten().numpy()) for rows in packed))
    shape = (2, *packed[0].shape)
    file = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8).view(shape)
    blocks = [
        [dataclasses.replace(block, data=data) for block, data in zip(row, of_row, strict=True)]
        for row, of_row in zip(parts.key.blocks, file, strict=True)
    ]
    twin = layer_of()
    twin.import_parts(LayerParts(dataclasses.replace(parts.key, blocks=blocks), parts.value))
    exported = twin.store.export(1, "key")
    assert exported[2].data.data_ptr() == file[1, 2].data_ptr()
    del file, blocks, packed
    assert torch.equal(twin.keys, layer.keys)


STORES = ["native", "foreign"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which store layers keep their tokens."""
    if request.param == "foreign":
        monkeypatch.setattr("kvlathe.cache.layer.make_store", ForeignStore)
    return str(request.param)


@dataclasses.dataclass
class Damage:
    """What is done to sound parts, and what a layer says to it.

    Attributes:
        change: gives other parts; it may also change the list of the keys' blocks in place.
        error, message: with which all stores refuse them.
        window: of the layers.
    """

    change: Callable[[LayerParts, list[list[Block]]], object]
    error: type[Exception]
    message: str
    window: int | None = None


def _block(error: type[Exception], message: str, **changes: Any) -> Damage:
    """The third block of row 1 with other fields."""

    def change(parts: LayerParts, rows: list[list[Block]]) -> None:
        fields = {name: new(rows[1][2]) if callable(new) else new for name, new in changes.items()}
        rows[1][2] = dataclasses.replace(rows[1][2], **fields)

    return Damage(change, error, message)


def _rows(error: type[Exception], message: str, change: Callable[[list[list[Any]]], object]) -> Damage:
    """Other lists of blocks."""
    return Damage(lambda parts, rows: change(rows) and None, error, message)


def _keys(error: type[Exception], message: str, window: int | None = None, **changes: Any) -> Damage:
    """Keys with other fields."""

    def change(parts: LayerParts, rows: list[list[Block]]) -> LayerParts:
        fields = {
            name: new(getattr(parts.key, name)) if callable(new) else new for name, new in changes.items()
        }
        return dataclasses.replace(parts, key=dataclasses.replace(parts.key, **fields))

    return Damage(change, error, message, window)


def _whole(error: type[Exception], message: str, change: Callable[[LayerParts], Any]) -> Damage:
    return Damage(lambda parts, rows: change(parts), error, message)


_BROKEN: dict[str, Damage] = {
    "digest": _block(BlockError, "packed with the preset 000000000000", digest="0" * 64),
    "short digest": _block(BlockError, "64 lower-case hex digits", digest="beef"),
    "upper-case digest": _block(BlockError, "64 lower-case hex", digest=lambda block: block.digest.upper()),
    "no digest": _block(BlockError, "64 lower-case hex digits", digest=None),
    "layer": _block(BlockError, "of layer 1, this is layer 0", layer=1),
    "negative layer": _block(BlockError, "layer is -1", layer=-1),
    "no layer": _block(BlockError, "layer is 'first'", layer="first"),
    "side": _block(BlockError, "holds values, keys belong here", side="value"),
    "no side": _block(BlockError, '"key" or "value"', side="both"),
    "position": _block(BlockError, "begins at position 17", first_position=17),
    "negative position": _block(BlockError, "first_position is -8", first_position=-8),
    "huge position": _block(BlockError, "begins at position", first_position=1 << 70),
    "fractional position": _block(BlockError, "first_position is 16.0", first_position=16.0),
    "truncated": _block(BlockError, "bytes, blocks of this layer", data=lambda block: block.data[:-1]),
    "overlong": _block(
        BlockError, "bytes, blocks of this layer", data=lambda block: torch.cat([block.data, block.data])
    ),
    "empty": _block(BlockError, "has 0 bytes", data=torch.empty(0, dtype=torch.uint8)),
    "signed bytes": _block(DtypeError, "int8, expected torch.uint8", data=lambda block: block.data.char()),
    "wide bytes": _block(DtypeError, "float32, expected torch.uint8", data=lambda block: block.data.float()),
    "two dimensions": _block(ShapeError, "expected \\[n_bytes\\]", data=lambda block: block.data[None]),
    "not on the CPU": _block(DeviceError, "on meta", data=lambda block: block.data.to("meta")),
    "no tensor": _block(DtypeError, "a bytes, expected a uint8 tensor", data=bytes),
    "no block": _rows(BlockError, "no kvlathe.Block", lambda rows: rows[0].__setitem__(0, b"bytes")),
    "reversed": _rows(BlockError, "in order", lambda rows: rows[1].reverse()),
    "swapped": _rows(BlockError, "in order", lambda rows: rows[1].insert(3, rows[1].pop(4))),
    "gap": _rows(BlockError, "in order", lambda rows: [row.pop(1) for row in rows]),
    "first one missing": _rows(BlockError, "in order", lambda rows: [row.pop(0) for row in rows]),
    "last one missing": _rows(
        ShapeError, "92 keys with 100 values", lambda rows: [row.pop() for row in rows]
    ),
    "one row's last missing": _rows(ShapeError, "as many blocks each", lambda rows: rows[1].pop()),
    "one row missing": _rows(ShapeError, "expected 2 rows", lambda rows: rows.pop()),
    "no rows": _rows(ShapeError, "expected 2 rows", lambda rows: rows.clear()),
    "a row too many": _rows(ShapeError, "expected 2 rows", lambda rows: rows.append(rows[0])),
    "no lists": _keys(BlockError, "a list of blocks for each row", blocks=None),
    "rows that are no lists": _rows(
        BlockError, "a list of blocks for each row", lambda rows: rows.append(None)
    ),
    "first": _keys(ShapeError, "from position 4 on", first=4),
    "first a block later": _keys(ShapeError, "from position 8 on", first=8),
    "negative first": _keys(ShapeError, "is -4", first=-4),
    "huge first": _keys(ShapeError, "expected 0 to", first=(1 << 48) + 1),
    "fractional first": _keys(ShapeError, "is 0.0", first=0.0),
    "too few sinks": _keys(ShapeError, "2 sinks", sinks=lambda sinks: sinks[:, :, :2]),
    "no sinks": _keys(ShapeError, "0 sinks", sinks=lambda sinks: sinks[:, :, :0]),
    "too many sinks": _keys(ShapeError, "8 sinks", sinks=lambda sinks: torch.cat([sinks, sinks], 2)),
    "short tail": _keys(ShapeError, "90 keys with 100 values", tail=lambda tail: tail[:, :, :2]),
    "long tail": _keys(ShapeError, "112 keys with 100", tail=lambda tail: torch.cat([tail, tail], 2)),
    "tail of another batch": _keys(ShapeError, "shape", tail=lambda tail: tail[:1]),
    "tail of other heads": _keys(ShapeError, "shape", tail=lambda tail: tail[:, :1]),
    "tail of another head_dim": _keys(ShapeError, "head_dim", tail=lambda tail: tail[..., :8]),
    "tail of three dimensions": _keys(ShapeError, "expected \\[batch, heads", tail=lambda tail: tail[0]),
    "sinks of another batch": _keys(ShapeError, "shape", sinks=lambda sinks: sinks[:1]),
    "sinks of other heads": _keys(ShapeError, "shape", sinks=lambda sinks: sinks[:, :1]),
    "sinks of another head_dim": _keys(ShapeError, "shape", sinks=lambda sinks: sinks[..., :8]),
    "tail in float64": _keys(DtypeError, "float64", tail=lambda tail: tail.double()),
    "tail in bfloat16": _keys(DtypeError, "bfloat16", tail=lambda tail: tail.bfloat16()),
    "sinks in bfloat16": _keys(DtypeError, "bfloat16", sinks=lambda sinks: sinks.bfloat16()),
    "all in float64": _whole(DtypeError, "float64", lambda parts: _all_exact(parts, Tensor.double)),
    "all integers": _whole(DtypeError, "int32", lambda parts: _all_exact(parts, Tensor.int)),
    "sinks elsewhere": _keys(DeviceError, "on meta", sinks=lambda sinks: sinks.to("meta")),
    "no tail": _keys(DtypeError, "a NoneType, expected a tensor", tail=None),
    "NaN in the tail": _keys(NonFiniteError, "NaN", tail=lambda tail: torch.full_like(tail, torch.nan)),
    "infinity in the sinks": _keys(
        NonFiniteError, "infinity", sinks=lambda sinks: torch.full_like(sinks, torch.inf)
    ),
    "too large a number": _keys(NonFiniteError, "magnitude", tail=lambda tail: torch.full_like(tail, 1e20)),
    "sides exchanged": _whole(BlockError, "belong here", lambda parts: LayerParts(parts.value, parts.key)),
    "no parts": _whole(BlockError, "a object is no kvlathe.LayerParts", lambda parts: object()),
    "one side only": _whole(
        BlockError, "value is a NoneType", lambda parts: dataclasses.replace(parts, value=None)
    ),
    "padding of more rows": _whole(
        ShapeError, "3 rows", lambda parts: dataclasses.replace(parts, padding=Padding([1, 0, 2], 4))
    ),
    "padding with other sinks": _whole(
        ShapeError, "2 exact slots", lambda parts: dataclasses.replace(parts, padding=Padding([1, 0], 2))
    ),
    "padding longer than the rows": _whole(
        ShapeError, "104 tokens", lambda parts: dataclasses.replace(parts, padding=Padding([100, 0], 4))
    ),
    "no padding": _whole(
        ShapeError, "padding is a list", lambda parts: dataclasses.replace(parts, padding=[1, 0])
    ),
    "padding in a window": Damage(
        lambda parts, rows: dataclasses.replace(parts, padding=Padding([1, 0], 4)),
        ShapeError,
        "without a window",
        200,
    ),
}


def _all_exact(parts: LayerParts, change: Callable[[Tensor], Tensor]) -> LayerParts:
    sides = [
        dataclasses.replace(side, sinks=change(side.sinks), tail=change(side.tail))
        for side in (parts.key, parts.value)
    ]
    return LayerParts(*sides)


@pytest.mark.parametrize("broken", _BROKEN)
def test_all_stores_refuse_the_same(broken: str, store: str) -> None:
    damage = _BROKEN[broken]
    sound = filled(window=damage.window).export_parts()
    rows = [list(row) for row in sound.key.blocks]
    with_rows = LayerParts(dataclasses.replace(sound.key, blocks=rows), sound.value)
    parts = damage.change(with_rows, rows) or with_rows
    twin = layer_of(window=damage.window)
    twin.activate_past_recording()
    noted = twin.padding_noted = PaddedRows((3, 0), 20)
    with pytest.raises(damage.error, match=damage.message) as caught:
        twin.import_parts(parts)
    assert type(caught.value) is damage.error and isinstance(caught.value, KvlatheError)
    assert twin.get_seq_length() == 0 and twin.memory_use() == (0, 0, 0) and twin.padding is None
    assert twin.padding_noted is noted and twin.record_past
    # Nothing has changed: the sound ones still go in.
    twin.import_parts(sound)
    assert twin.get_seq_length() == 100
    assert torch.equal(twin.keys, filled(window=damage.window).keys)


def test_a_window_must_find_all_that_it_shows(store: str) -> None:
    parts = filled(window=30).export_parts()
    assert parts.key.first > 0
    for window in (None, 90):
        twin = layer_of(window=window)
        with pytest.raises(ShapeError, match="window"):
            twin.import_parts(parts)
        assert twin.get_seq_length() == 0
    layer_of(window=20).import_parts(parts)


def test_blocks_need_not_be_contiguous(store: str) -> None:
    layer = filled()
    parts = layer.export_parts()

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0]

    sides = [
        dataclasses.replace(
            side,
            sinks=spread(side.sinks),
            tail=spread(side.tail),
            blocks=[[dataclasses.replace(b, data=spread(b.data)) for b in row] for row in side.blocks],
        )
        for side in (parts.key, parts.value)
    ]
    twin = layer_of()
    twin.import_parts(LayerParts(*sides))
    assert torch.equal(twin.keys, layer.keys) and torch.equal(twin.values, layer.values)


def test_exact_tokens_are_copied_both_ways(store: str) -> None:
    layer, twin = filled(), layer_of()
    keys = layer.keys
    parts = layer.export_parts()
    twin.import_parts(parts)
    for side in (parts.key, parts.value):
        side.sinks.zero_()
        side.tail.zero_()
    assert torch.equal(layer.keys, keys) and torch.equal(twin.keys, keys)


def test_parts_keep_no_graph(store: str) -> None:
    parts, twin = filled().export_parts(), layer_of()
    twin.import_parts(_all_exact(parts, lambda tensor: tensor.requires_grad_()))
    assert not twin.keys.requires_grad


def test_what_goes_in_and_out_of_an_empty_layer(store: str) -> None:
    full, sound = filled(), filled().export_parts()
    with pytest.raises(CacheStateError, match="empty one"):
        full.import_parts(sound)
    emptied = filled()
    emptied.crop(-100)
    for empty in (layer_of(), emptied):
        with pytest.raises(CacheStateError, match="holds no tokens, so there is nothing to export"):
            empty.export_parts()
        empty.import_parts(sound)
        assert torch.equal(empty.keys, full.keys)


@pytest.mark.parametrize("way", ["native to foreign", "foreign to native"])
def test_stores_read_one_anothers_blocks(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's and a CPU's do."""
    patches = pytest.MonkeyPatch()
    if way == "foreign to native":
        patches.setattr("kvlathe.cache.layer.make_store", ForeignStore)
    layer = filled()
    parts = layer.export_parts()
    patches.undo()
    if way == "native to foreign":
        monkeypatch.setattr("kvlathe.cache.layer.make_store", ForeignStore)
    twin = layer_of()
    twin.import_parts(parts)
    with expanded():
        torch.testing.assert_close(twin.keys, layer.keys, rtol=1e-5, atol=1e-5)
        new = random_kv(30, batch=2, seed=1)
        for ours, theirs in zip(layer.update(*new), twin.update(*new), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_users_compressor_exports_no_blocks() -> None:
    layer = CompressedLayer(IdentityCompressor(), low_rank(), Policy(0, 0, 0))
    layer.update(*random_kv(20))
    with pytest.raises(BlockError, match="does not pack blocks"):
        layer.export_parts()


def test_equal_presets_read_one_anothers_blocks(tmp_path: Path) -> None:
    """A preset and its file have one digest, and so have their blocks."""
    preset = preset_of("llama")
    preset.save(tmp_path / "twin.json")
    twin = Preset.load(tmp_path / "twin.json")
    assert twin.digest == preset.digest and twin is not preset
    caches = [CompressedDynamicCache.from_preset(each, uncompressed_tail=9) for each in (preset, twin)]
    caches[0].update(*random_kv(80), 0)
    caches[1].layers[0].import_parts(caches[0].layers[0].export_parts())
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
