"""Chunks joined to a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._native import Container, PackedRow
from ..cache.container import SIDES, Header, restore_form, side_parts
from ..cache.layer import CompressedLayer
from ..errors import ContainerError
from ..preset import Preset, Side
from ..stores import BlockRow, LayerParts, SideParts


@dataclass(frozen=True)
class Chunk:
    """A chunk, or its layers of one kind, as it was found.

    Attributes:
        native: mapped or in memory, and checked.
        header: what it says of itself.
    """

    native: Container
    header: Header

    @classmethod
    def of(cls, native: Container) -> Chunk:
        return cls(native, json.loads(native.header_json()))


@dataclass(frozen=True)
class FoundRow:
    """What was found of one row.

    Attributes:
        full: layers of full attention, of all chunks; empty if the model has none.
        window: layers with windows, of the last chunks.
    """

    full: list[Chunk]
    window: list[Chunk]


def fill(
    layers: Sequence[CompressedLayer], rows: Sequence[FoundRow], preset: Preset, device: torch.device
) -> None:
    """Fill an empty cache's layers with the chunks of each row, which have as many tokens in all of them. Blocks are
    attended to where they lie.

    Raises:
        ContainerError: chunks of another preset or geometry.
        BlockError, ShapeError: blocks that do not follow each other.
    """
    for chunk in (chunk for row in rows for chunk in (*row.full, *row.window)):
        if chunk.header["preset"] != preset.digest or len(chunk.header["layers"]) != len(layers):
            raise ContainerError("a chunk of this store was packed with another preset than its name says")
    for index, layer in enumerate(layers):
        of_rows = [row.window if layer.is_sliding else row.full for row in rows]
        shapes = [chunk.header["layers"][index] for chunks in of_rows for chunk in chunks]
        if not any(shapes):
            continue  # a layer that the model leaves out
        _check_shapes(index, layer, shapes)
        layer.import_parts(LayerParts(*(_side(of_rows, index, side, device) for side in SIDES)))
        restore_form(layer, shapes[0])


def _check_shapes(index: int, layer: CompressedLayer, shapes: Sequence[Header | None]) -> None:
    """All chunks hold the layer, in one geometry, and as the preset and the model have it."""
    expected = (layer.policy.n_sinks, layer.policy.window)
    kinds = set()
    for shape in shapes:
        given = None if shape is None else (shape["n_sinks"], shape["window"])
        if shape is not None:
            kinds.add((shape["n_heads"], shape["dtype"], *shape["model_dtypes"]))
        if given != expected or len(kinds) != 1:
            raise ContainerError(
                f"layer {index} of a stored chunk has (sinks, window) {given}, expected {expected}, or other heads "
                f"than its neighbour"
            )


def _side(of_rows: Sequence[Sequence[Chunk]], layer: int, side: Side, device: torch.device) -> SideParts:
    """Exact tokens of each row's first chunk, and the blocks of all."""
    firsts = [side_parts(chunks[0].native, chunks[0].header, layer, side, device) for chunks in of_rows]
    rows = [
        BlockRow(PackedRow.joined([chunk.native.blocks(layer, side, 0) for chunk in chunks]))
        for chunks in of_rows
    ]
    sinks, tail = (torch.cat([getattr(each, name) for each in firsts]) for name in ("sinks", "tail"))
    return SideParts(firsts[0].first, sinks, rows, tail)
