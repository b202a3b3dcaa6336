"""A cache cut into chunks, each of which stands alone: `docs/container_format.md`, chunks of a prefix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..cache.container import (
    Header,
    SideContents,
    check_portable,
    held_by_all,
    layer_shape,
    origin,
    preset_of,
    side_contents,
)
from ..cache.layer import CompressedLayer
from ..errors import ShapeError
from ..stores import BlockRow, LayerParts, SideParts
from ..stores.block import native_row

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
        self.n_tokens, self.batch = held_by_all(layers)
        self.preset = preset_of(layers)
        self._chunk_len, self._block_len = chunk_len, self.preset.block_len
        self._n_layers = len(layers)
        # Of each layer that holds something: a twin that has coded every whole block, and what that holds.
        self._held: dict[int, tuple[CompressedLayer, LayerParts]] = {}
        for index, layer in enumerate(layers):
            if not layer.get_seq_length():
                continue
            if layer.padding is not None:
                raise ShapeError(
                    f"layer {index} holds rows with padding in front, where a prefix has its first tokens; give "
                    f"sequences of different lengths one by one"
                )
            packed = _packed(layer)
            self._held[index] = packed, packed.export_parts()

    def parts(self, n_chunks: int) -> Iterator[ChunkPart]:
        """What there is of the first chunks."""
        for index in range(n_chunks):
            for is_window in (False, True):
                if self._holds(index, is_window):
                    yield index, is_window

    def can_end(self, n_chunks: int) -> bool:
        """Whether layers with windows still hold all that a query behind so many chunks sees."""
        seen = [
            packed.policy.first_seen(n_chunks * self._chunk_len)
            for packed, _ in self._held.values()
            if packed.is_sliding
        ]
        if not seen or not n_chunks:
            return True
        first = min(min(seen) // self._chunk_len, n_chunks - 1)
        return all(self._holds(index, True) for index in range(first, n_chunks))

    def file(
        self, row: int, part: ChunkPart, chunk_key: str, weights: str
    ) -> tuple[ChunkPart, str, list[tuple[SideContents, SideContents]]]:
        """A chunk of one row for `NativePrefixStore.put`: which it is, its header, and its layers."""
        index, is_window = part
        shapes: list[Header | None] = [None] * self._n_layers
        contents = []
        for layer, (packed, parts) in self._of_kind(is_window).items():
            keys, values = (self._chunk(side, row, index) for side in (parts.key, parts.value))
            shapes[layer] = layer_shape(packed, LayerParts(keys, values))
            contents.append((side_contents(keys), side_contents(values)))
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
        return part, json.dumps(header), contents

    def _of_kind(self, is_window: bool) -> dict[int, tuple[CompressedLayer, LayerParts]]:
        return {layer: held for layer, held in self._held.items() if held[0].is_sliding == is_window}

    def _holds(self, index: int, is_window: bool) -> bool:
        layers = self._of_kind(is_window)
        start, end = index * self._chunk_len, (index + 1) * self._chunk_len
        return bool(layers) and all(
            side.first <= start and end <= self._first_slot(side) + len(side.blocks[0]) * self._block_len
            for _, parts in layers.values()
            for side in (parts.key, parts.value)
            if isinstance(side, SideParts)
        )

    def _first_slot(self, side: SideParts) -> int:
        """Position of the first block's."""
        return (side.first + side.sinks.shape[2]) // self._block_len * self._block_len

    def _chunk(self, side: Any, row: int, index: int) -> SideParts:
        """A row's tokens of one chunk; sinks belong to the first one."""
        start, first_slot = index * self._chunk_len, self._first_slot(side)
        at = max(0, start - first_slot) // self._block_len
        stop = (start + self._chunk_len - first_slot) // self._block_len
        sinks = side.sinks[row : row + 1]
        blocks = BlockRow(native_row(side.blocks[row]).part(at, stop))
        return SideParts(start, sinks if start == 0 else sinks[:, :, :0], [blocks], side.tail[:1, :, :0])


def _packed(layer: CompressedLayer) -> CompressedLayer:
    """A twin that has coded every whole block; it shares those that are packed already."""
    policy = replace(layer.policy, compress_start_len=0, n_tail=0)
    twin = CompressedLayer(layer.compressor("key"), layer.compressor("value"), policy)
    twin.import_parts(layer.export_parts())
    twin.store.compress()
    twin.form = layer.form
    return twin
