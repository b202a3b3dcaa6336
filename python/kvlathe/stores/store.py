"""What a layer's store does, and which tokens it keeps exact.

All stores keep the same layout, ``sinks | coded | tail``, and follow the same rules: tokens enter at the tail and leave
it in whole blocks, which begin at multiples of their length; a crop into coded tokens puts the rest of their block back
into the tail as decoded; what has left a sliding window is dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..counts import is_count
from ..errors import ShapeError
from ..preset import Side
from .block import Block
from .parts import SideParts, SideRuns


@dataclass(frozen=True)
class Policy:
    """Which tokens stay exact, and which are held at all; in tokens.

    Attributes:
        n_sinks: the first ones of a sequence, exact always.
        compress_start_len: nothing is coded until the sequence is longer than this.
        n_tail: the last ones, exact; up to a block less one more are, because blocks are coded whole.
        window: what a query sees at most, its own token included; None for all.

    Raises:
        ShapeError: a negative number of tokens, or a window without a token.
    """

    n_sinks: int
    compress_start_len: int
    n_tail: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name, given in (
            ("n_sinks", self.n_sinks),
            ("compress_start_len", self.compress_start_len),
            ("n_tail", self.n_tail),
        ):
            if not is_count(given) or given > sys.maxsize:
                raise ShapeError(f"{name} is {given!r}, expected a whole number of tokens, at least 0")
        window = self.window
        if window is not None and (not is_count(window) or not 1 <= window <= sys.maxsize):
            raise ShapeError(f"sliding_window is {window!r}, expected at least 1 token")

    def first_seen(self, n_past: int) -> int:
        """Position of the first token that a query behind ``n_past`` tokens sees."""
        return 0 if self.window is None else max(0, n_past + 1 - self.window)


class Attention(NamedTuple):
    """What queries find among some tokens.

    Attributes:
        out: [B, q, Hq, D].
        lse: float32 [B, Hq, q], the log of the sum of e^score, with which results over different tokens are joined; −∞
            for a query that saw nothing. A score of ``sink_scores`` is among the summands.
    """

    out: Tensor
    lse: Tensor


class Store(Protocol):
    """What `CompressedLayer` needs of a store. A refused call leaves it as it was."""

    @property
    def policy(self) -> Policy: ...
    @property
    def n_tokens(self) -> int:
        """Tokens of each row, forgotten ones among them."""

    @property
    def first(self) -> int:
        """Position from which on both sides are held."""

    @property
    def n_coded(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever coded: the model's own attention then gives the stock cache's very bits."""

    @property
    def attends_packed(self) -> bool:
        """Whether `attend` reads packed tokens; else it expands them, a section at a time."""

    @property
    def why_expanded(self) -> str | None:
        """A sentence for the user, of a store with a calibrated codec that expands."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens [B, H, n, D]."""

    def compress(self) -> None:
        """Code what is due."""

    def settle(self) -> None:
        """`compress`, and before it drop what no later query sees."""

    def forget(self) -> None:
        """Drop what no later query sees."""

    def would_settle(self) -> bool:
        """Whether `settle` would change anything."""

    def read(self, first: int, end: int, *, n_tokens: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens from position ``first`` on, to the ``end``-th, and room for more: [B, H, end - first + room, D].

        Args:
            n_tokens: as many as the caller has seen; with another number held it is refused.
        """

    def attend(
        self,
        queries: Tensor,
        *,
        n_tokens: int,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_scores: Tensor | None = None,
    ) -> Attention:
        """Attention of queries [B, Hq, q, D] over the tokens held.

        Args:
            n_tokens: as many as the caller has seen; with another number held it is refused.
            mask: bool [1 or B, 1, q, tokens], True = seen, its tokens all, or in a sliding window the last ones, those
                that any query sees; None is causal, the last query at the last token.
            softcap: scores become softcap · tanh(score / softcap).
            sink_scores: [Hq], a score that joins the softmax without a value.
        """

    def crop(self, n_tokens: int) -> None:
        """Remove the newest tokens."""

    def select(self, rows: list[int]) -> None:
        """Replace the batch by these rows."""

    def export(self, row: int, side: Side) -> Sequence[Block]:
        """A row's packed blocks, oldest first, which share their bytes with the store."""

    def export_parts(self, side: Side) -> SideParts:
        """One side of all rows."""

    def saved_parts(self, side: Side) -> SideParts | SideRuns:
        """As `export_parts`, for a file: what no preset's codec has coded comes as it is stored."""

    def import_parts(self, keys: SideParts | SideRuns, values: SideParts | SideRuns) -> None:
        """Fill an empty store with what another one has exported or saved, each of whose sides `check` has passed."""

    def memory_use(self) -> tuple[int, int, int]:
        """Bytes held: exact, coded, and those of the coded ones that lie in somebody else's memory."""

    def copy(self) -> Store: ...
    def mark(self) -> Any:
        """What `return_to` needs to undo calls of `append` that follow, of which nothing was coded or forgotten."""

    def return_to(self, mark: Any) -> None: ...
