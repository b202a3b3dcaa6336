"""What a layer holds, as values: blocks by name, what other compressors have stored, and exact tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..counts import is_count
from ..errors import BlockError, DeviceError, DtypeError, ShapeError
from ..preset import Side
from ..saved import by_maker, maker
from .block import Block, BlockRow, alone
from .nested_tensors import map_tensors

# No sequence is that long; sums of positions stay numbers.
MAX_POSITION = 1 << 48


@dataclass(frozen=True, eq=False)
class SideParts:
    """Keys or values of a layer, all rows.

    Attributes:
        first: position of the first token that is held.
        sinks: exact tokens from there on, [B, H, n, D].
        blocks: for each row its packed blocks, oldest first.
        tail: exact tokens behind them, [B, H, n, D].
    """

    first: int
    sinks: Tensor
    blocks: Sequence[Sequence[Block]]
    tail: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        name, positions, packed = self._as_one()
        sinks, tail = alone(self.sinks), alone(self.tail)
        return by_maker("side", self.first, sinks, name, positions, packed, tail)

    def _as_one(self) -> tuple[tuple[str, int, Side] | None, list[int], Any]:
        """The blocks' name, their positions in each row, and one uint8 tensor [B, blocks, n_bytes], not thousands:
        `torch.load(mmap=True)` maps it, and blocks are read there. Blocks that are not alike stay as they are.
        """
        rows = [list(row) for row in self.blocks]
        names = {(block.digest, block.layer, block.side) for row in rows for block in row}
        positions = {tuple(block.first_position for block in row) for row in rows}
        kinds = {(block.data.shape, block.data.dtype) for row in rows for block in row}
        if not len(names) == len(positions) == len(kinds) == 1:
            return None, [], rows
        packed = torch.stack([torch.stack([block.data for block in row]) for row in rows])
        return names.pop(), list(positions.pop()), packed

    def check(self) -> None:
        """Refuse what is no side of any layer.

        Raises:
            BlockError, ShapeError, DtypeError, DeviceError
        """
        _check_exact(self.first, self.sinks, self.tail)
        if not isinstance(self.blocks, list) or not all(
            isinstance(row, (list, BlockRow)) for row in self.blocks
        ):
            raise BlockError("blocks must be a list that has a list of blocks for each row")
        for row in self.blocks:
            if isinstance(row, BlockRow):
                continue  # native code makes nothing else
            for block in row:
                if not isinstance(block, Block):
                    raise BlockError(
                        f"a {type(block).__name__} is no kvlathe.Block; give blocks as export_parts() gives them"
                    )
                block.check()


@dataclass(frozen=True)
class Run:
    """Coded tokens, ``n_tokens`` from position ``first`` on, as one call of `compress`, or several, gave them."""

    first: int
    n_tokens: int
    data: Any

    @property
    def end(self) -> int:
        return self.first + self.n_tokens


@dataclass(frozen=True, eq=False)
class SideRuns:
    """As `SideParts`, of a side whose compressor packs no blocks.

    Attributes:
        first, sinks, tail: as of `SideParts`.
        runs: of all rows together, oldest first.
    """

    first: int
    sinks: Tensor
    runs: list[Run]
    tail: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        runs = [(run.first, run.n_tokens, map_tensors(run.data, alone)) for run in self.runs]
        return by_maker("runs", self.first, alone(self.sinks), runs, alone(self.tail))

    def check(self) -> None:
        """Refuse what is no side of any layer.

        Raises:
            BlockError: runs with gaps between them, or without tokens.
            ShapeError, DtypeError, DeviceError
        """
        _check_exact(self.first, self.sinks, self.tail)
        position = self.first + int(self.sinks.shape[2])
        for run in self.runs:
            if run.first != position or not is_count(run.n_tokens) or run.n_tokens == 0:
                raise BlockError(
                    f"{run.n_tokens!r} coded tokens from position {run.first!r} on, expected some from {position} on; "
                    f"save the cache again"
                )
            position = run.end


@maker("parts")
@dataclass(frozen=True, eq=False)
class LayerParts:
    """What a layer holds, as values: `CompressedLayer.export_parts` gives them, `import_parts` takes them.

    Attributes:
        key, value: its sides.
        padding: of a left-padded batch: where the tokens of its rows are kept, for the layer to know.
    """

    key: SideParts | SideRuns
    value: SideParts | SideRuns
    padding: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return by_maker("parts", self.key, self.value, self.padding)

    def check(self) -> None:
        """Refuse what is no layer of any cache.

        Raises:
            BlockError, ShapeError, DtypeError, DeviceError
        """
        for name, side in (("key", self.key), ("value", self.value)):
            if not isinstance(side, (SideParts, SideRuns)):
                raise BlockError(f"{name} is a {type(side).__name__}, expected kvlathe.SideParts")
            side.check()


def _check_exact(first: int, sinks: Tensor, tail: Tensor) -> None:
    """Refuse what cannot be the exact tokens of a side, from position ``first`` on.

    Raises:
        ShapeError, DtypeError, DeviceError
    """
    if not is_count(first) or first > MAX_POSITION:
        raise ShapeError(f"the position of a side's first token is {first!r}, expected 0 to {MAX_POSITION}")
    for name, states in (("sinks", sinks), ("tail", tail)):
        if not isinstance(states, Tensor):
            raise DtypeError(f"the {name} are a {type(states).__name__}, expected a tensor")
        if states.dim() != 4:
            raise ShapeError(
                f"the {name} have the shape {list(states.shape)}, expected [batch, heads, tokens, head_dim]"
            )
    if sinks.device != tail.device:
        raise DeviceError(
            f"the sinks are on {sinks.device}, the tail is on {tail.device}; both must be on one device"
        )
    if sinks.dtype != tail.dtype:
        raise DtypeError(
            f"the sinks are {sinks.dtype}, the tail is {tail.dtype}; both must have the model's dtype"
        )


@maker("side")
def _side(
    first: int,
    sinks: Tensor,
    name: tuple[str, int, Side] | None,
    positions: list[int],
    packed: Any,
    tail: Tensor,
) -> SideParts:
    blocks = packed
    if name is not None:
        # Wherever a file is loaded to: blocks are values on the CPU.
        rows = packed.cpu()
        blocks = [
            [Block(*name, position, data) for position, data in zip(positions, row, strict=True)]
            for row in rows
        ]
    side = SideParts(first, sinks, blocks, tail)
    side.check()
    return side


@maker("runs")
def _runs(first: int, sinks: Tensor, runs: list[tuple[int, int, Any]], tail: Tensor) -> SideRuns:
    side = SideRuns(first, sinks, [Run(*fields) for fields in runs], tail)
    side.check()
    return side
