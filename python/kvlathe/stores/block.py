"""Packed blocks as values: named, moved, shared, and attended to where they lie."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, overload

import torch
from torch import Tensor

from .._native import MappedBytes, PackedBlock, PackedRow
from ..counts import is_count
from ..errors import BlockError, DeviceError, DtypeError, ShapeError
from ..preset import Side
from ..saved import by_maker, maker

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Block:
    """A packed block: ``block_len`` tokens of one row of a batch, all KV heads of one side of a layer.

    Attributes:
        digest: of the preset that packed it (`Preset.digest`); only a cache of that preset can read it.
        layer: from 0.
        side: "key" or "value".
        first_position: of its first slot, a multiple of ``block_len``.
        data: uint8 [n_bytes] on the CPU, contiguous: `docs/block_format.md`. A view of the memory that a cache reads,
            or of a mapped file: nobody may write to it.
    """

    digest: str
    layer: int
    side: Side
    first_position: int
    data: Tensor

    def __bytes__(self) -> bytes:
        return bytes(self.data.numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        data = alone(self.data)
        return by_maker("block", self.digest, self.layer, self.side, self.first_position, data)

    def check(self) -> None:
        """Refuse what is no block of any layer.

        Raises:
            BlockError: a name or position that no block has.
            ShapeError, DtypeError, DeviceError: bytes that are not uint8 [n_bytes] on the CPU.
        """
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise BlockError(
                f"a block's digest is {self.digest!r}, expected the 64 lower-case hex digits of Preset.digest"
            )
        if self.side not in get_args(Side):
            raise BlockError(f'a block\'s side is {self.side!r}, expected "key" or "value"')
        for name, given in (("layer", self.layer), ("first_position", self.first_position)):
            if not is_count(given):
                raise BlockError(f"a block's {name} is {given!r}, expected a whole number, at least 0")
        if not isinstance(self.data, Tensor):
            raise DtypeError(
                f"a block's data is a {type(self.data).__name__}, expected a uint8 tensor; torch.frombuffer() makes "
                f"one of bytes"
            )
        if self.data.dtype != torch.uint8:
            raise DtypeError(f"a block's data is {self.data.dtype}, expected torch.uint8")
        if self.data.dim() != 1:
            raise ShapeError(f"a block's data has the shape {list(self.data.shape)}, expected [n_bytes]")
        if self.data.device.type != "cpu":
            raise DeviceError(f"a block's data is on {self.data.device}, expected it on the CPU; call cpu()")


class BlockRow(Sequence[Block]):
    """A row's packed blocks in native memory, oldest first. A `Block` is made when it is asked for."""

    def __init__(self, native: PackedRow) -> None:
        self.native = native

    def __len__(self) -> int:
        return len(self.native)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        found = range(len(self))[index]
        if isinstance(found, range):
            return [self[at] for at in found]
        return from_native(self.native.block(found))


@maker("block")
def _block(*fields: Any) -> Block:
    block = Block(*fields)
    block.check()
    return block


def alone(tensor: Tensor) -> Tensor:
    """For a file, which gets all of a tensor's memory: the same numbers without others beside them."""
    is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if is_part else tensor


def memory_of(owner: PackedBlock | MappedBytes) -> Tensor:
    """The bytes of something native, uint8 [n_bytes]; it lives as long as they do."""
    if not owner.n_bytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_uint8 * owner.n_bytes).from_address(owner.address)
    # torch keeps the array, and the array what it is of.
    memory.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


def from_native(block: PackedBlock) -> Block:
    """A block whose bytes are those of the native one."""
    return Block(block.digest, block.layer, block.side, block.first_position, memory_of(block))


def to_native(block: Block) -> PackedBlock:
    """A native block that reads the same bytes where they lie, as `Block.check` wants them."""
    data = block.data.contiguous()
    return PackedBlock(block.digest, block.layer, block.side, block.first_position, data)


def native_row(blocks: Sequence[Block]) -> PackedRow:
    """A row's blocks for native memory.

    Raises:
        BlockError: something that is no block.
    """
    return blocks.native if isinstance(blocks, BlockRow) else PackedRow([to_native(each) for each in blocks])
