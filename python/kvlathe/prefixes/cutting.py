"""A cache cut into chunks, each of which stands alone: `docs/container_format.md`, chunks of a prefix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._native import PackedRow
from ..cache.container import SIDES, check_portable, layer_shape, origin, preset_of
from ..cache.layer import CompressedLayer
from ..errors import CacheStateError, ShapeError
from ..stores import LayerParts, SideParts
from ..stores.block import native_row

# Sinks, each row's blocks, tail.
_Side = tuple[Tensor, list[PackedRow], Tensor]


# A chunk's number from 0, and whether its layers with windows are meant, which a prefix needs near its end only, not
# those of full attention.
ChunkPart = tuple[int, bool]


class CutCache:
    """What the layers of a cache hold, all whole blocks packed, as chunks.

    Args:
        layers: of the cache; they are left as they are.
        chunk_len: tokens of a chunk, a whole number of blocks.

    Raises:
        ModelError: layers that are transformers' own.
        PresetError: a cache that is not made from one calibrated preset.
        CacheStateError: an empty cache, or layers that are unlike.
        ShapeError: rows with padding in front.
    """

    def __init__(self, layers: Sequence[Any], chunk_len: int) -> None:
        check_portable(layers)
        held = {layer.held for layer in layers if layer.get_seq_length()}
        if len(held) != 1:
            raise CacheStateError(
                "the layers of this cache are unlike, as a pass through the model was cut short; crop(0) or reset()"
                if held
                else "this cache holds nothing"
            )
        self.n_tokens, self.batch = held.pop()
        self.preset = preset_of(layers)
        self._chunk_len, self._block_len = chunk_len, self.preset.block_len
        self._shapes: list[dict[str, Any] | None] = []
        self._parts: list[LayerParts | None] = []
        for index, layer in enumerate(layers):
            if not layer.get_seq_length():
                self._shapes.append(None)
                self._parts.append(None)
                continue
            if layer.padding is not None:
                raise ShapeError(
                    f"layer {index} holds rows with padding in front, where a prefix has its first tokens; give "
                    f"sequences of different lengths one by one"
                )
            packed = _packed(layer)
            parts = packed.export_parts()
            self._parts.append(parts)
            self._shapes.append(layer_shape(packed, parts))

    def parts(self, n_chunks: int) -> Iterator[ChunkPart]:
        """What there is of the first chunks."""
        for index in range(n_chunks):
            for is_window in (False, True):
                if self._holds(index, is_window):
                    yield index, is_window

    def can_end(self, n_chunks: int) -> bool:
        """Whether layers with windows still hold all that a query behind so many chunks sees."""
        windows = [shape["window"] for shape in self._shapes if shape is not None and shape["window"]]
        if not windows or not n_chunks:
            return True
        first_token = max(0, n_chunks * self._chunk_len + 1 - max(windows))
        first = min(first_token // self._chunk_len, n_chunks - 1)
        return all(self._holds(index, True) for index in range(first, n_chunks))

    def file(
        self, row: int, part: ChunkPart, chunk_key: str, weights: str
    ) -> tuple[str, list[tuple[_Side, _Side]]]:
        """A chunk of one row for `NativePrefixStore.put`: its header, and its layers."""
        index, is_window = part
        shapes: list[dict[str, Any] | None] = [None] * len(self._shapes)
        contents = []
        for layer in self._of_kind(is_window):
            shape, parts = self._shapes[layer], self._parts[layer]
            assert shape is not None and parts is not None
            of_chunk = {**shape}
            sides = []
            for side in SIDES:
                of_chunk[side], content = self._side(shape[side], getattr(parts, side), row, index)
                sides.append(content)
            shapes[layer] = of_chunk
            contents.append((sides[0], sides[1]))
        start = index * self._chunk_len
        header = {
            **origin(self.preset, weights),
            "n_tokens": start + self._chunk_len,
            "batch": 1,
            "has_token_ids": True,
            "first_token_id": start,
            "chunk_key": chunk_key,
            "compress_start_len": 0,
            "uncompressed_tail": 0,
            "layers": shapes,
        }
        return json.dumps(header), contents

    def _of_kind(self, is_window: bool) -> list[int]:
        return [
            index
            for index, shape in enumerate(self._shapes)
            if shape is not None and (shape["window"] is not None) == is_window
        ]

    def _holds(self, index: int, is_window: bool) -> bool:
        layers = self._of_kind(is_window)
        start, end = index * self._chunk_len, (index + 1) * self._chunk_len
        return bool(layers) and all(
            side.first <= start and end <= self._coded_end(side)
            for parts in map(self._parts.__getitem__, layers)
            if parts is not None
            for side in (parts.key, parts.value)
            if isinstance(side, SideParts)
        )

    def _first_block(self, side: SideParts) -> int:
        """Position of its first slot."""
        return (side.first + side.sinks.shape[2]) // self._block_len * self._block_len

    def _coded_end(self, side: SideParts) -> int:
        return self._first_block(side) + len(side.blocks[0]) * self._block_len

    def _side(
        self, shape: dict[str, Any], side: SideParts, row: int, index: int
    ) -> tuple[dict[str, Any], _Side]:
        start, first_block = index * self._chunk_len, self._first_block(side)
        at = max(0, start - first_block) // self._block_len
        stop = (start + self._chunk_len - first_block) // self._block_len
        sinks = side.sinks[row : row + 1] if start == 0 else side.sinks[:1, :, :0]
        of_chunk = {
            **shape, "first": start, "n_sinks": sinks.shape[2], "n_blocks": stop - at, "n_tail": 0
        }  # fmt: skip
        raw = sinks.detach().cpu().contiguous().view(-1).view(torch.uint8)
        blocks = native_row(side.blocks[row]).part(at, stop)
        return of_chunk, (raw, [blocks], torch.empty(0, dtype=torch.uint8))


def _packed(layer: CompressedLayer) -> CompressedLayer:
    """A twin that has coded every whole block; it shares those that are packed already."""
    policy = replace(layer.policy, compress_start_len=0, n_tail=0)
    twin = CompressedLayer(layer.compressor("key"), layer.compressor("value"), policy)
    twin.import_parts(layer.export_parts())
    twin.store.compress()
    twin.form = layer.form
    return twin
