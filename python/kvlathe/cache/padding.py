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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor

from ..errors import PaddingWarning, ShapeError

Found = TypeVar("Found")


class OfLatest(Generic[Found]):
    """What a function finds of a tensor, kept while it is asked about the same one: layers of a pass share a mask."""

    def __init__(self, find: Callable[..., Found]) -> None:
        self._find = find
        self._latest: tuple[ref[Tensor], tuple[Any, ...], Found] | None = None

    def __call__(self, tensor: Tensor, *more: Any) -> Found:
        latest = self._latest  # once: another thread may put its own there
        if latest is None or latest[0]() is not tensor or latest[1] != more:
            latest = self._latest = ref(tensor), more, self._find(tensor, *more)
        return latest[2]


@dataclass(frozen=True)
class PaddedRows:
    """What is known of a batch before its first tokens come.

    Attributes:
        lengths: tokens of padding in front of each row.
        n_tokens: of the batch, as far as they are known.
    """

    lengths: tuple[int, ...]
    n_tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> PaddedRows:
        """Of a mask [B, tokens] that is nonzero where there is a token to see."""
        seen = mask != 0
        n_tokens = mask.shape[1]
        lengths = torch.where(seen.any(dim=-1), seen.int().argmax(dim=-1), n_tokens)
        return cls(tuple(int(n) for n in lengths.tolist()), n_tokens)

    @classmethod
    def of_first_pass(cls, mask: Tensor) -> PaddedRows:
        """Of a bool mask [B, 1, T, T] that attention of the first tokens goes by: real tokens see themselves."""
        return cls.of(mask[:, 0].diagonal(dim1=1, dim2=2))

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


class Padding:
    """Where the tokens of padded rows are kept. Immutable.

    Args:
        lengths: tokens of padding in front of each row.
        n_sinks: exact slots, at least 1.
    """

    def __init__(self, lengths: Sequence[int], n_sinks: int) -> None:
        self.lengths, self.n_sinks = tuple(lengths), n_sinks
        # Slots, and tokens, that are not where they would be without padding.
        self.reach = max(lengths) + n_sinks
        slots = torch.arange(self.reach).repeat(len(lengths), 1)
        padding = torch.tensor(self.lengths)[:, None]
        moved = (slots < padding + n_sinks) & (padding > 0)
        # [B, reach]: the token in each slot, and the slot of each token.
        token = torch.where(slots < n_sinks, slots + padding, slots - n_sinks)
        slot = torch.where(slots < padding, slots + n_sinks, slots - padding)
        self._token, self._slot = torch.where(moved, token, slots), torch.where(moved, slot, slots)

    def to_slots(self, states: Tensor) -> Tensor:
        """Keys or values [B, H, T, D] of the first T ≥ `reach` tokens, in the order of slots."""
        self._token = self._token.to(states.device)  # once
        moved = states.clone()
        head = states[:, :, : self.reach]
        moved[:, :, : self.reach] = head.gather(2, self._token[:, None, :, None].expand(head.shape))
        return moved

    def to_tokens(self, states: Tensor) -> None:
        """Puts expanded keys or values [B, H, T, D] into the order of tokens, in place."""
        self._slot = self._slot.to(states.device)
        head = states[:, :, : self.reach]
        states[:, :, : self.reach] = head.gather(2, self._slot[:, None, :, None].expand(head.shape))

    def mask_of_slots(self, mask: Tensor) -> Tensor:
        """A mask of tokens [1 or B, 1, q, T] as one of slots [B, 1, q, T]."""
        return _mask_of_slots(mask, self)

    def _move_mask(self, mask: Tensor) -> Tensor:
        self._token = self._token.to(mask.device)
        moved = mask.expand(len(self.lengths), -1, -1, -1).clone()
        head = moved[..., : self.reach]
        moved[..., : self.reach] = head.gather(3, self._token[:, None, None, :].expand(head.shape))
        return moved

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Padding) and (self.lengths, self.n_sinks) == (other.lengths, other.n_sinks)

    def __hash__(self) -> int:
        return hash((self.lengths, self.n_sinks))

    def select(self, rows: Sequence[int]) -> Padding:
        """That of a batch of these rows."""
        lengths = tuple(self.lengths[row] for row in rows)
        return self if lengths == self.lengths else Padding(lengths, self.n_sinks)


# For the layers of one pass: of the latest mask only, which the next pass's replaces.
padded_rows_of_first_pass = OfLatest(PaddedRows.of_first_pass)
_mask_of_slots = OfLatest(lambda mask, padding: padding._move_mask(mask))
