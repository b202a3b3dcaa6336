"""Rows of a batch that begin with padding: their first real tokens are the ones that stay exact.

The first slots of a layer's store, its sinks, are exact. In a row behind p tokens of padding they take that row's first
real tokens, which attention leans on like on no others, and the padding, which nobody sees, follows:

```text
token  0 ... p-1 | p ... p+n-1 | p+n ...        n sinks
slot   n ... p+n-1 | 0 ... n-1 | p+n ...
```

All tokens from p + n on are in the slot of their own number, so blocks keep their positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..counts import is_count
from ..errors import PaddingWarning, ShapeError
from ..saved import by_maker, maker


def _is_seen(mask: Tensor) -> Tensor:
    """Of a mask that is bool, or added to scores."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


@maker("padded rows")
@dataclass(frozen=True)
class PaddedRows:
    """What is known of a batch before its first tokens come.

    Attributes:
        lengths: tokens of padding in front of each row.
        n_tokens: of the batch, as far as they are known.
    """

    lengths: tuple[int, ...]
    n_tokens: int

    def __reduce__(self) -> tuple[Any, ...]:
        return by_maker("padded rows", self.lengths, self.n_tokens)

    def __post_init__(self) -> None:
        _check_lengths(self.lengths)
        if not is_count(self.n_tokens):
            raise ShapeError(f"padding of {self.n_tokens!r} tokens, expected a whole number, at least 0")

    @classmethod
    def of(cls, mask: Tensor) -> PaddedRows:
        """Of a mask [B, tokens] that is nonzero where there is a token to see."""
        seen = mask != 0
        n_tokens = mask.shape[1]
        lengths = torch.where(seen.any(dim=-1), seen.int().argmax(dim=-1), n_tokens)
        return cls(tuple(int(n) for n in lengths.tolist()), n_tokens)

    @classmethod
    def of_first_pass(cls, mask: Tensor, batch: int, n_tokens: int) -> PaddedRows | None:
        """Of a mask that attention of the first tokens goes by: bool, or added to scores. Nobody sees padding.

        Returns:
            None for a mask of another shape than [1 or B, 1, T, T] or less dimensions: nothing is known then.
        """
        while mask.dim() < 4:
            mask = mask[None]
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (n_tokens, n_tokens):
            return None
        mask = mask[:, 0]
        # Real tokens mostly see themselves, which is quickly found; only else does it matter who else sees them.
        rows = cls.of(_is_seen(mask.diagonal(dim1=1, dim2=2)))
        return cls.of(_is_seen(mask.amax(1))) if any(rows.lengths) else rows

    def in_slots(self, n_new: int, batch: int, n_sinks: int) -> Padding | None:
        """How the ``n_new`` tokens of a first pass are kept, of a batch of as many rows or a multiple (beams).

        Raises:
            ShapeError: a batch of another size.
        """
        if batch % len(self.lengths):
            raise ShapeError(
                f"padding was noted for {len(self.lengths)} rows, the batch has {batch}; call note_padding() for this "
                f"batch, or reset() the cache"
            )
        if not any(self.lengths) or n_sinks == 0 or n_new < n_sinks:
            return None
        most = n_new - n_sinks
        if any(n >= n_new or (n > most and self.n_tokens > n_new) for n in self.lengths):
            warnings.warn(
                f"rows of this batch begin with up to {max(self.lengths)} tokens of padding, and the first pass "
                f"through the model brings {n_new}: the first tokens of such rows will be coded like all others, which "
                f"costs quality; give the first pass all of the padding and {n_sinks} tokens more (prefill_chunk_size)",
                PaddingWarning,
                stacklevel=4,
            )
        # A row of fewer tokens than sinks has them all in exact slots, and some padding with them.
        lengths = [min(n, most) for n in self.lengths for _ in range(batch // len(self.lengths))]
        return Padding(lengths, n_sinks)


@maker("padding")
class Padding:
    """Where the tokens of padded rows are kept. Immutable.

    Args:
        lengths: tokens of padding in front of each row.
        n_sinks: exact slots, at least 1.

    Raises:
        ShapeError: lengths that no rows have, or no exact slots.
    """

    def __init__(self, lengths: Sequence[int], n_sinks: int) -> None:
        _check_lengths(lengths)
        if not is_count(n_sinks) or n_sinks == 0:
            raise ShapeError(f"padding with {n_sinks!r} exact slots a row, expected at least 1")
        self.lengths, self.n_sinks = tuple(lengths), n_sinks
        # Slots, and tokens, that are not where they would be without padding.
        self.reach = max(lengths) + n_sinks
        self._indices: tuple[Tensor, Tensor] | None = None

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[B, reach]: the token in each slot, and the slot of each token."""
        if self._indices is None:
            n_sinks = self.n_sinks
            slots = torch.arange(self.reach).repeat(len(self.lengths), 1)
            padding = torch.tensor(self.lengths)[:, None]
            moved = (slots < padding + n_sinks) & (padding > 0)
            token = torch.where(slots < n_sinks, slots + padding, slots - n_sinks)
            slot = torch.where(slots < padding, slots + n_sinks, slots - padding)
            self._indices = torch.where(moved, token, slots), torch.where(moved, slot, slots)
        token, slot = self._indices
        if token.device != device:
            token, slot = self._indices = token.to(device), slot.to(device)
        return token, slot

    def __reduce__(self) -> tuple[Any, ...]:
        return by_maker("padding", self.lengths, self.n_sinks)

    def to_slots(self, states: Tensor) -> Tensor:
        """Keys or values [B, H, T, D] of the first T ≥ `reach` tokens, in the order of slots."""
        token, _ = self.indices(states.device)
        moved = states.clone()
        head = states[:, :, : self.reach]
        moved[:, :, : self.reach] = head.gather(2, token[:, None, :, None].expand(head.shape))
        return moved

    def to_tokens(self, states: Tensor) -> None:
        """Puts expanded keys or values [B, H, T, D] into the order of tokens, in place."""
        _, slot = self.indices(states.device)
        head = states[:, :, : self.reach]
        states[:, :, : self.reach] = head.gather(2, slot[:, None, :, None].expand(head.shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Padding) and (self.lengths, self.n_sinks) == (other.lengths, other.n_sinks)

    def __hash__(self) -> int:
        return hash((self.lengths, self.n_sinks))

    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return self  # immutable

    def check(self, n_tokens: int, batch: int, n_sinks: int) -> None:
        """Refuse to say where a layer with so many tokens, rows and sinks keeps them, if that cannot be.

        Raises:
            ShapeError
        """
        if len(self.lengths) != batch or self.n_sinks != n_sinks or self.reach > n_tokens:
            raise ShapeError(
                f"padding of {len(self.lengths)} rows with {self.n_sinks} exact slots, which moves {self.reach} "
                f"tokens, for a layer of {batch} rows with {n_sinks} sinks and {n_tokens} tokens; export and import "
                f"all parts of one layer"
            )

    def select(self, rows: Sequence[int]) -> Padding:
        """That of a batch of these rows."""
        lengths = tuple(self.lengths[row] for row in rows)
        return self if lengths == self.lengths else Padding(lengths, self.n_sinks)


def _check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or not all(is_count(n) for n in lengths):
        raise ShapeError(
            f"rows with {lengths!r} tokens of padding, expected a whole number for each, at least 0"
        )


def mask_of_slots(mask: Tensor, padding: Padding) -> Tensor:
    """A mask of tokens [1 or B, 1, q, T] as one of slots [B, 1, q, T]. For a `PassMemo`: layers with equal padding
    share it.
    """
    token, _ = padding.indices(mask.device)
    moved = mask.expand(len(padding.lengths), -1, -1, -1).clone()
    head = moved[..., : padding.reach]
    moved[..., : padding.reach] = head.gather(3, token[:, None, None, :].expand(head.shape))
    return moved
