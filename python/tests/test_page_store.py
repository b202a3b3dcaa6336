"""Pages of servers: laid out in any of their orders, kept, found by those who may, refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlathe import ModelError, PrefixStoreError, Preset, PresetError, ShapeError
from kvlathe._native import StreamSetCodec
from kvlathe.plugins.page_layout import PageLayout
from kvlathe.plugins.page_store import PageStore
from kvlathe.presets import smollm2

PRESET = Preset.load(smollm2())
LAYERS, HEADS, DIM, TOKENS = 30, 3, 64, 128
LAYOUT = PageLayout("LBHNC", LAYERS, 1, HEADS, 8, 16, DIM, torch.bfloat16)


def store_of(url: str, layout: PageLayout = LAYOUT, **options: Any) -> PageStore:
    options = {"server": "a test", "model": "SmolLM2", "weights": "ab", **options}
    return PageStore(url, PRESET, layout, **options)


def coded(layer: int, side: int, numbers: Tensor) -> Tensor:
    """What the preset's codec makes of a layer's side of the second page, [heads, tokens, head_dim]."""
    codec = PRESET.codec(layer, ("key", "value")[side])
    assert isinstance(codec, StreamSetCodec)
    packed = torch.zeros(1, TOKENS // PRESET.block_len, codec.block_bytes, dtype=torch.uint8)
    out = torch.empty(1, *numbers.shape)
    codec.encode(numbers.float()[None].contiguous(), TOKENS, packed)
    codec.decode(packed, TOKENS, out)
    return out[0]


def lying(layout: PageLayout, numbers: Tensor) -> Tensor:
    """A row of a server's memory that holds a page, [2, layers, heads, tokens, head_dim], by `layout.axes` alone."""
    w, h, b, n = layout.n_workers, layout.n_heads, layout.n_blocks, layout.block_tokens
    split = numbers.view(2, LAYERS, w, h, b, n, DIM)
    axes = {"S": 0, "L": 1, "W": 2, "H": 3, "B": 4, "N": 5, "D": 6}
    order = "W" + layout.axes.replace("C", "SD")
    row = split.permute([axes[axis] for axis in order]).contiguous().flatten()
    return torch.cat([row.view(torch.uint8), torch.zeros(64, dtype=torch.uint8)]).view(1, -1)


@pytest.fixture(scope="module")
def numbers() -> Tensor:
    """The second page of what SmolLM2's layers might hold: keys and values as its preset expects them, and noise."""
    torch.manual_seed(5)
    noise = torch.randn(2, LAYERS, HEADS, TOKENS, DIM)
    for index in range(LAYERS):
        for side in range(2):
            noise[side, index] = coded(index, side, noise[side, index])
    return noise.to(torch.bfloat16)


def test_every_order_of_memory_makes_the_same_objects(tmp_path: Path, numbers: Tensor) -> None:
    files = set()
    orders = ["".join(axes) for axes in permutations("LBHNC") if axes[-1] == "C"]
    served = [axes for axes in orders if axes.index("B") < axes.index("H")]
    for at, axes in enumerate(served):
        layout = replace(LAYOUT, axes=axes, n_workers=[1, 3][at % 2], n_heads=[3, 1][at % 2])
        folder = tmp_path / str(at)
        folder.mkdir()
        store_of(folder.as_uri(), layout).save([(b"key", TOKENS)], lying(layout, numbers), [0])
        (file,) = folder.rglob("*.kvl")
        files.add(file.read_bytes())
    assert len(served) == 12 and len(files) == 1
    with pytest.raises(ModelError, match="heads of a block"):
        replace(LAYOUT, axes="LHBNC")


def test_a_page_comes_back_as_coded(tmp_path: Path, numbers: Tensor) -> None:
    store = store_of(tmp_path.as_uri())
    memory = lying(LAYOUT, numbers).repeat(3, 1)
    name = (b"key", TOKENS)
    assert store.missing([name, (b"other", TOKENS), (b"key", 0)]) == [True] * 3
    (n_bytes,) = store.save([name], memory, [1])
    assert store.missing([name, (b"other", TOKENS), (b"key", 0)]) == [False, True, True]
    # 1.75 bits a number; the table of blocks and its alignment come on top.
    assert n_bytes < LAYOUT.n_bytes / 8
    again = torch.full_like(memory, 7)
    assert store.load([name, (b"other", TOKENS)], again, [2, 0]) == [(n_bytes, None), (None, None)]
    assert (again[:2] == 7).all() and (again[2, LAYOUT.n_bytes :] == 7).all()
    row = again[2, : LAYOUT.n_bytes].view(torch.bfloat16).view(LAYERS, 8, HEADS, 16, 2, DIM)
    page = row.permute(4, 0, 2, 1, 3, 5).reshape(numbers.shape).float()
    for index in (0, 17, 29):
        for side in range(2):
            expected = coded(index, side, numbers[side, index]).to(torch.bfloat16)
            assert torch.equal(page[side, index], expected.float())
    store.touch([name])


def test_scopes_do_not_meet(tmp_path: Path, numbers: Tensor) -> None:
    name, memory = (b"key", TOKENS), lying(LAYOUT, numbers)
    store_of(tmp_path.as_uri()).save([name], memory, [0])
    for options in ({"weights": "cd"}, {"server": "b"}, {"extra_key": "x"}, {"tenant_secret": "s"}):
        assert store_of(tmp_path.as_uri(), **options).missing([name]) == [True]
    assert store_of(tmp_path.as_uri(), replace(LAYOUT, dtype=torch.float16)).missing([name]) == [True]


def test_numbers_in_another_order_are_not_kept(tmp_path: Path, numbers: Tensor) -> None:
    store, name = store_of(tmp_path.as_uri()), (b"key", TOKENS)
    for wrong in (
        lying(replace(LAYOUT, axes="LBNHC"), numbers),
        lying(replace(LAYOUT, axes="BLHNC"), numbers),
        lying(LAYOUT, numbers.flip(1).contiguous()),
    ):
        assert store.save([name], wrong, [0]) == [0]
        assert store.missing([name]) == [True]
    assert store.save([name], lying(LAYOUT, numbers), [0])[0] > 0


@pytest.mark.parametrize(
    ("layout", "error", "words"),
    [
        (replace(LAYOUT, n_layers=29), PresetError, "use a preset of this model"),
        (replace(LAYOUT, n_heads=4), PresetError, "use a preset of this model"),
        (replace(LAYOUT, n_blocks=3), ShapeError, "multiple of the preset's blocks of 64"),
        (replace(LAYOUT, slots=list(range(5))), ShapeError, "places of a block"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, layout: PageLayout, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        store_of(tmp_path.as_uri(), layout)


def test_bad_calls_are_refused(tmp_path: Path, numbers: Tensor) -> None:
    with pytest.raises(PrefixStoreError, match="file:///folder"):
        store_of("nonsense")
    store, memory = store_of(tmp_path.as_uri()), lying(LAYOUT, numbers)
    name = (b"key", TOKENS)
    for rows in ([1], [0, 0], []):
        with pytest.raises(ShapeError, match="different ones below 1"):
            store.save([name] * max(1, len(rows)), memory, rows)
    with pytest.raises(ShapeError, match="where a block begins"):
        store.save([(b"key", 5)], memory, [0])
    with pytest.raises(ShapeError, match="memory of a page"):
        store.save([name], memory[:, :-100].contiguous(), [0])
    assert not list(tmp_path.rglob("*.kvl"))
