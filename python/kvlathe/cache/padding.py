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

import torch
from torch import Tensor

from ..errors import PaddingWarning


def padding_lengths(mask: Tensor) -> list[int]:
    """Tokens of padding in front of each row, of a mask [B, tokens] that is nonzero where there is a token to see.

    A row without any counts as one without padding.
    """
    seen = mask != 0
    return [int(n) for n in (seen.int().argmax(dim=-1) * seen.any(dim=-1)).tolist()]


def warn_of_padding(reach: int, n_new: int) -> None:
    """Says, once, that padded rows will lose quality."""
    warnings.warn(
        f"a row's padding and the first tokens after it are {reach} tokens, of which the first pass through the model "
        f"brings {n_new}: that row's first tokens will be coded like all others, which costs quality; let the first "
        f"pass have {reach} tokens or more (prefill_chunk_size={reach})",
        PaddingWarning,
        stacklevel=3,
    )


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
        self._token = torch.where(
            moved, torch.where(slots < n_sinks, slots + padding, slots - n_sinks), slots
        )
        self._slot = torch.where(moved, torch.where(slots < padding, slots + n_sinks, slots - padding), slots)

    def to_slots(self, states: Tensor) -> Tensor:
        """Keys or values [B, H, T, D] of the first T ≥ `reach` tokens, in the order of slots."""
        moved = states.clone()
        head = states[:, :, : self.reach]
        moved[:, :, : self.reach] = head.gather(2, self._index(self._token, head))
        return moved

    def to_tokens(self, states: Tensor) -> None:
        """Puts expanded keys or values [B, H, T, D] into the order of tokens, in place."""
        head = states[:, :, : self.reach]
        states[:, :, : self.reach] = head.gather(2, self._index(self._slot, head))

    def mask_of_slots(self, mask: Tensor) -> Tensor:
        """A mask of tokens [1 or B, 1, q, T] as one of slots [B, 1, q, T]."""
        moved = mask.expand(len(self.lengths), -1, -1, -1).clone()
        head = moved[..., : self.reach]
        index = self._token.to(mask.device)[:, None, None, :].expand(head.shape)
        moved[..., : self.reach] = head.gather(3, index)
        return moved

    @staticmethod
    def _index(order: Tensor, states: Tensor) -> Tensor:
        return order.to(states.device)[:, None, :, None].expand(states.shape)

    def select(self, rows: Sequence[int]) -> Padding:
        """That of a batch of these rows."""
        return Padding([self.lengths[row] for row in rows], self.n_sinks)
