"""A layer's tokens as torch tensors, on any device and with any compressor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compressors import check_fits
from ..errors import CacheStateError, NonFiniteError
from ..preset import Side
from ..torch_codec import MAX_MAGNITUDE, can_be_coded
from . import sections
from .block import Block
from .fit import check_ends
from .foreign_side import ForeignSide
from .nested_tensors import bytes_of
from .out_of_memory import as_resource_error
from .parts import SideParts, SideRuns
from .store import Attention, Policy


class ForeignStore:
    """A `Store` of torch tensors: any device, any compressor. Attention expands coded tokens, a section at a time.

    Args:
        why_expanded: a sentence for the user, where native memory would have attended to packed tokens.
    """

    attends_packed = False

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        keys: Tensor,
        values: Tensor,
        *,
        why_expanded: str | None = None,
    ) -> None:
        check_fits(k_compressor, keys, "keys")
        check_fits(v_compressor, values, "values")
        self.policy, self.why_expanded = policy, why_expanded
        self._sides = [
            # New tensors, not views: an empty view would keep the prompt's whole tensor alive.
            ForeignSide(compressor, policy.n_sinks, torch.empty_like(tensor[:, :, :0]))
            for compressor, tensor in ((k_compressor, keys), (v_compressor, values))
        ]
        self.is_exact = not any(side.is_coded for side in self._sides)
        self._granularity = max(side.granularity for side in self._sides)

    @property
    def n_tokens(self) -> int:
        return self._sides[0].n_tokens

    @property
    def first(self) -> int:
        return max(side.first for side in self._sides)

    @property
    def n_coded(self) -> int:
        return max(side.n_coded for side in self._sides)

    @property
    def batch(self) -> int:
        return int(self._sides[0].tail.shape[0])

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._check_numbers(keys, values)
        with self._both_or_none() as sides:
            for side, tensor in zip(sides, (keys, values), strict=True):
                side.append(tensor.detach())

    def _check_numbers(self, keys: Tensor, values: Tensor) -> None:
        for side, tensor, name in zip(self._sides, (keys, values), ("keys", "values"), strict=True):
            if side.is_coded and not can_be_coded(tensor):
                raise NonFiniteError(
                    f"{name} hold NaN, infinity or a magnitude above {MAX_MAGNITUDE:g}, which cannot be coded; the "
                    f"model's {name} are broken before they reach the cache"
                )

    @contextmanager
    def _both_or_none(self) -> Iterator[list[ForeignSide]]:
        """Copies of both sides to be changed, which take their places if nothing goes wrong."""
        sides = [side.copy() for side in self._sides]
        with as_resource_error(self.n_tokens):
            yield sides
        self._sides = sides

    def would_settle(self) -> bool:
        first_seen = self.policy.first_seen(self.n_tokens)
        return first_seen > self.first or any(self._due(side, first_seen) for side in self._sides)

    def forget(self) -> None:
        with self._both_or_none() as sides:
            for side in sides:
                side.forget_before(self.policy.first_seen(self.n_tokens))

    def settle(self) -> None:
        self._code_behind(self.policy.first_seen(self.n_tokens))

    def compress(self) -> None:
        self._code_behind(0)

    def _code_behind(self, position: int) -> None:
        """Drop what is before ``position``, then code what is due; both or neither."""
        with self._both_or_none() as sides:
            for side in sides:
                side.forget_before(position)
                end = self._due(side, position)
                if end:
                    side.code(end)

    def _due(self, side: ForeignSide, position: int) -> int:
        """Position to which a side is to be coded, once what is before ``position`` is gone; 0 if nothing is due."""
        n_tokens = side.n_tokens
        if not side.is_coded or n_tokens <= self.policy.compress_start_len:
            return 0
        end = (n_tokens - self.policy.n_tail) // self._granularity * self._granularity
        return end if end > max(side.tail_at, min(position, n_tokens)) else 0

    def read(self, first: int, end: int, *, n_tokens: int, room: int = 0) -> tuple[Tensor, Tensor]:
        self._check_held(n_tokens)
        with as_resource_error(n_tokens):
            keys, values = (side.read(first, end, room) for side in self._sides)
        return keys, values

    def _check_held(self, n_tokens: int) -> None:
        if self.n_tokens != n_tokens:
            raise CacheStateError(
                f"this layer holds {self.n_tokens} tokens, {n_tokens} when the call began: another thread uses the "
                f"same cache; give each thread a cache of its own"
            )

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
        self._check_held(n_tokens)
        with as_resource_error(n_tokens):
            return sections.attend(
                self, queries, int(self._sides[0].tail.shape[1]), n_tokens=n_tokens, mask=mask, scaling=scaling,
                softcap=softcap, sink_scores=sink_scores,
            )  # fmt: skip

    def crop(self, n_tokens: int) -> None:
        with self._both_or_none() as sides:
            for side in sides:
                side.crop(n_tokens)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self._sides[0].tail.device)
        with self._both_or_none() as sides:
            for side in sides:
                side.select(index)

    def _side(self, side: Side) -> ForeignSide:
        return self._sides[side == "value"]

    def export(self, row: int, side: Side) -> list[Block]:
        return self._side(side).export(row)

    def export_parts(self, side: Side) -> SideParts:
        return self._side(side).export_parts()

    def saved_parts(self, side: Side) -> SideParts | SideRuns:
        return self._side(side).saved_parts()

    def import_parts(self, keys: SideParts | SideRuns, values: SideParts | SideRuns) -> None:
        if self.n_tokens:
            raise CacheStateError(
                f"this layer holds {self.n_tokens} tokens, but blocks are imported into an empty one; call reset() "
                f"first"
            )
        with self._both_or_none() as (key_side, value_side):
            key_side.import_parts(keys, "key")
            value_side.import_parts(values, "value")
            check_ends(
                (key_side.n_tokens, value_side.n_tokens), (key_side.first, value_side.first), self.policy
            )
            for name in ("sinks", "tail"):
                self._check_numbers(getattr(keys, name), getattr(values, name))

    def memory_use(self) -> tuple[int, int, int]:
        exact = sum(bytes_of(t) for side in self._sides for t in (side.sinks, side.tail))
        coded = sum(bytes_of(run.data) for side in self._sides for run in side.runs)
        return exact, coded, 0

    def copy(self) -> ForeignStore:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # Tensors are replaced, never written to, so copies may share them.
        twin._sides = [side.copy() for side in self._sides]
        return twin

    def mark(self) -> list[ForeignSide]:
        return self._sides

    def return_to(self, mark: list[ForeignSide]) -> None:
        self._sides = mark
