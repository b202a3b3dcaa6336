"""Whether one side of a layer, as values, fits a store. All stores refuse the same, with the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .._native import StreamSetCodec
from ..errors import BlockError, DtypeError, ShapeError
from ..preset import Side
from .block import Block
from .parts import MAX_POSITION, SideParts
from .store import Policy

UNNAMED = (
    "blocks of this layer have no name that another cache could know them by: its codec was not made from a preset; "
    "take codecs from Preset.codec(layer, side)"
)


@dataclass(frozen=True)
class Place:
    """One side of a store, for values to fit into.

    Attributes:
        side: which one.
        like: an empty tensor [B, H, 0, D] as its exact tokens are.
        n_sinks: first tokens of a sequence that it keeps exact.
        codec: what packs its blocks; None for a side that packs none.
    """

    side: Side
    like: Tensor
    n_sinks: int
    codec: StreamSetCodec | None

    def check_states(self, name: str, states: Tensor) -> None:
        """Refuse exact tokens of another batch, heads, head_dim or dtype.

        Raises:
            ShapeError, DtypeError
        """
        batch, heads, _, dim = self.like.shape
        if states.dtype != self.like.dtype:
            raise DtypeError(f"the {self.side}s' {name} are {states.dtype}, expected {self.like.dtype}")
        if (*states.shape[:2], states.shape[3]) != (batch, heads, dim):
            raise ShapeError(
                f"the {self.side}s' {name} have the shape {list(states.shape)}, expected [{batch}, {heads}, n, {dim}]"
            )

    def end_of(self, parts: SideParts) -> int:
        """Position behind the last token of parts that fit, as far as their blocks' number tells.

        Raises:
            BlockError: blocks for a side that has none.
            ShapeError, DtypeError: exact tokens that do not fit.
        """
        self.check_states("sinks", parts.sinks)
        self.check_states("tail", parts.tail)
        batch, n_blocks = self.like.shape[0], len(parts.blocks[0]) if parts.blocks else 0
        counts = [len(row) for row in parts.blocks]
        if counts != [n_blocks] * batch:
            raise ShapeError(
                f"the {self.side}s have {counts} blocks in their rows, expected {batch} rows with as many blocks each"
            )
        n_sinks, n_tail = int(parts.sinks.shape[2]), int(parts.tail.shape[2])
        coded_at = parts.first + n_sinks
        self._check_sinks(parts.first, n_sinks, n_blocks + n_tail)
        if self.codec is None:
            if n_blocks:
                raise BlockError(
                    f"{n_blocks} blocks of {self.side}s a row for a side whose compressor does not pack blocks; only "
                    f"a preset's codecs do"
                )
            return coded_at + n_tail
        blocks_at = self._blocks_at(parts, self.codec)
        return (blocks_at + n_blocks * self.codec.block_len if n_blocks else coded_at) + n_tail

    def _blocks_at(self, parts: SideParts, codec: StreamSetCodec) -> int:
        return (parts.first + int(parts.sinks.shape[2])) // codec.block_len * codec.block_len

    def _check_sinks(self, first: int, n_sinks: int, n_behind: int) -> None:
        """Sinks end where the layer's do, or where their sequence ends; a window may have dropped them."""
        end = first + n_sinks
        if (end > self.n_sinks and n_sinks) or (end < self.n_sinks and n_behind):
            raise ShapeError(
                f"the {self.side}s have {n_sinks} sinks from position {first} on, and this layer keeps its first "
                f"{self.n_sinks} tokens exact; export and import with one preset, and with windows alike"
            )

    def check_blocks(self, parts: SideParts, rows: Mapping[int, Sequence[Block]]) -> None:
        """Refuse blocks that belong elsewhere, in some rows of parts, by their numbers.

        Raises:
            BlockError: blocks of another preset, layer or side, out of order, with gaps, or of another length.
        """
        codec = self.codec
        if codec is None:
            return
        positions = range(self._blocks_at(parts, codec), MAX_POSITION, codec.block_len)
        if codec.id is None:
            raise BlockError(UNNAMED)
        digest, layer, side = codec.id
        n_bytes = codec.block_bytes
        for row, blocks in rows.items():
            for index, (block, position) in enumerate(zip(blocks, positions, strict=False)):
                if block.digest != digest:
                    problem = (
                        f"it was packed with the preset {block.digest[:12]}, this layer's is {digest[:12]}; use the "
                        f"preset that packed it"
                    )
                elif block.layer != layer:
                    problem = f"it is of layer {block.layer}, this is layer {layer}"
                elif block.side != side:
                    problem = f"it holds {block.side}s, {side}s belong here"
                elif block.first_position != position:
                    problem = (
                        f"it begins at position {block.first_position}, the block that belongs here at {position}; "
                        f"give a row's blocks in order, without gaps"
                    )
                elif block.data.numel() != n_bytes:
                    problem = f"it has {block.data.numel()} bytes, blocks of this layer have {n_bytes}"
                else:
                    continue
                raise BlockError(f"block {index} of row {row} does not belong there: {problem}")


def check_ends(ends: tuple[int, int], firsts: tuple[int, int], policy: Policy) -> None:
    """Refuse keys and values, by the positions behind their last tokens and of their first ones, that make no layer.

    Raises:
        ShapeError: of different length, or without tokens that a window of the layer still shows.
    """
    if ends[0] != ends[1]:
        raise ShapeError(
            f"parts of {ends[0]} keys with {ends[1]} values; export both from one layer at one time"
        )
    first_seen = policy.first_seen(ends[0])
    if max(firsts) > first_seen:
        raise ShapeError(
            f"the parts' first token is that of position {max(firsts)}, and this layer's window of {policy.window} "
            f"still shows {first_seen}; import into a layer with the same window or a shorter one"
            if policy.window is not None
            else f"the parts' first token is that of position {max(firsts)}, and this layer has no window: it shows "
            f"all tokens; import into a layer with the window of the one that exported them"
        )
