"""What a layer keeps its tokens in, and which of them stay exact.

All stores keep the same layout, ``sinks | coded | tail``, and follow the same rules: tokens enter at the tail and leave
it in whole blocks, a crop into coded tokens puts the rest of their block back into the tail as decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """Which tokens stay exact, in tokens."""

    n_sinks: int
    compress_start_len: int
    n_tail: int


class LayerStore(Protocol):
    """What `CompressedLayer` needs of a store."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def n_coded(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def can_attend(self) -> bool: ...
    def append(self, keys: Tensor, values: Tensor) -> None: ...
    def compress(self) -> None: ...
    def read(self, room: int = 0) -> tuple[Tensor, Tensor]: ...
    def crop(self, n_tokens: int) -> None: ...
    def select(self, rows: list[int]) -> None: ...
    def memory_use(self) -> tuple[int, int]: ...
    def copy(self) -> LayerStore: ...
    def mark(self) -> Any:
        """What `return_to` needs to undo calls of `append` that follow, of which nothing was coded or forgotten."""

    def return_to(self, mark: Any) -> None: ...
