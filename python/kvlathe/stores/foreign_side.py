"""One side, keys or values, of a layer held as torch tensors.

How a compressor's stored form is cut differs: `_Packed` blocks and `_Tokens` coded one by one are joined to one piece,
as their layout is known; a user's stored forms stay piece by piece, as each call of `compress` gave them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._native import StreamSetCodec
from ..compressors import IdentityCompressor, StreamSetCompressor, granularity
from ..errors import BlockError, ShapeError
from ..preset import Side
from .block import Block
from .fit import UNNAMED, Place
from .nested_tensors import map_tensors
from .parts import Run, SideParts, SideRuns

# Tokens that a user's compressor gets at once: one call a token would be slow.
_RUN_LEN = 32


class ForeignSide:
    """Keys or values of a `ForeignStore`. Its tensors are replaced, never written to."""

    def __init__(self, compressor: nn.Module, n_sinks: int, empty: Tensor) -> None:
        self.compressor: Any = compressor
        self.is_coded = type(compressor) is not IdentityCompressor
        self.n_sinks = n_sinks if self.is_coded else 0
        # Where a stored form counts tokens; None for a user's. Of blocks, which depend on their position, that is 1.
        self.token_dim: int | None = getattr(compressor, "coded_token_dim", None)
        self.is_packed = self.token_dim == 1
        known = self.token_dim is not None or not self.is_coded
        self.granularity = granularity(compressor) if known else _RUN_LEN
        self.sinks, self.tail = empty, empty
        self.runs: list[Run] = []
        # Position of the first token held; above 0 only behind a sliding window.
        self.first = 0

    @property
    def coded_at(self) -> int:
        """Position of the first coded token."""
        return self.first + int(self.sinks.shape[2])

    @property
    def tail_at(self) -> int:
        """Position of the tail's first token."""
        return self.runs[-1].end if self.runs else self.coded_at

    @property
    def n_coded(self) -> int:
        return self.tail_at - self.coded_at

    @property
    def n_tokens(self) -> int:
        return self.tail_at + int(self.tail.shape[2])

    def _slot(self, position: int) -> int:
        """Position of the first slot of the block that has a position."""
        return position // self.granularity * self.granularity

    def append(self, x: Tensor) -> None:
        begins = not self.runs and not self.tail.shape[2]
        to_sinks = max(0, min(self.n_sinks - self.coded_at, x.shape[2])) if begins else 0
        if to_sinks:
            self.sinks = torch.cat([self.sinks, x[:, :, :to_sinks]], dim=2)
        self.tail = torch.cat([self.tail, x[:, :, to_sinks:]], dim=2)

    def code(self, end: int) -> None:
        """Code the tail's tokens before position ``end``, at which a block of both sides ends."""
        start = self.tail_at
        n_tokens = end - start
        x, tail = self.tail[:, :, :n_tokens].contiguous(), self.tail[:, :, n_tokens:].clone()
        if self.token_dim is None:
            new, at = [], start
            while at < end:
                stop = min(end, self._slot(at) + self.granularity)
                part = x[:, :, at - start : stop - start]
                new.append(Run(at, stop - at, self.compressor.compress(part)))
                at = stop
            self.runs = [*self.runs, *new]
        else:
            if self.is_packed:
                # Slots of tokens that are sinks, or forgotten, are zero vectors.
                slot = self._slot(start)
                x = nn.functional.pad(x, (0, 0, start - slot, 0))
                data = self.compressor.compress(x, slot)
            else:
                data = self.compressor.compress(x)
            if self.runs:
                data = torch.cat([self.runs[0].data, data], dim=self.token_dim)
                start, n_tokens = self.runs[0].first, end - self.runs[0].first
            self.runs = [Run(start, n_tokens, data)]
        self.tail = tail

    def _expand(self, run: Run, first: int, end: int) -> Tensor:
        """The tokens of a run from position ``first`` on, to the ``end``-th."""
        dtype = self.tail.dtype
        if self.is_packed:
            slot = self._slot(run.first)
            start, stop = (first - slot) // self.granularity, -(-(end - slot) // self.granularity)
            position = slot + start * self.granularity
            x = self.compressor.expand(run.data.narrow(1, start, stop - start), position, dtype)
            return x[:, :, first - position : end - position]
        if self.token_dim is not None:
            part = run.data.narrow(self.token_dim, first - run.first, end - first)
            return self.compressor.expand(part, dtype)
        return self.compressor.expand(run.data).to(dtype)[:, :, first - run.first : end - run.first]

    def read(self, first: int, end: int, room: int = 0) -> Tensor:
        """The tokens from position ``first`` on, to the ``end``-th, and room for more: [B, H, n, D]."""
        parts = [self.sinks[:, :, max(0, first - self.first) : max(0, end - self.first)]]
        for run in self.runs:
            start, stop = max(first, run.first), min(end, run.end)
            if start < stop:
                parts.append(self._expand(run, start, stop))
        tail_at = self.tail_at
        parts.append(self.tail[:, :, max(0, first - tail_at) : max(0, end - tail_at)])
        batch, heads, _, dim = self.tail.shape
        parts.append(self.tail.new_empty(batch, heads, room, dim))
        return torch.cat(parts, dim=2)

    def crop(self, n_tokens: int) -> None:
        end = self.n_tokens - n_tokens
        if end >= self.tail_at:
            self.tail = self.tail[:, :, : end - self.tail_at]
            return
        if end <= self.coded_at:
            self.runs, self.tail = [], self.tail[:, :, :0]
            self.sinks = self.sinks[:, :, : end - self.first]
            return
        runs = [run for run in self.runs if run.first < end]
        cut = runs[-1]
        # What stays coded ends with a block; a user's piece that is cut goes back to the tail whole.
        kept = cut.first if self.token_dim is None else max(cut.first, self._slot(end))
        kept = end if end == cut.end else kept
        self.tail = self.read(kept, end)
        self.runs = runs if kept == cut.end else [*runs[:-1], *self._first_of(cut, kept)]

    def _first_of(self, run: Run, end: int) -> list[Run]:
        """A run's tokens before position ``end``, at which a block ends; none, if there are none."""
        if end <= run.first:
            return []
        assert self.token_dim is not None
        n_units = (end - (self._slot(run.first) if self.is_packed else run.first)) // self.granularity
        return [Run(run.first, end - run.first, run.data.narrow(self.token_dim, 0, n_units))]

    def forget_before(self, position: int) -> None:
        """Drop tokens before ``position``; of coded ones only whole blocks, so some of them may stay."""
        n_sinks = max(0, min(position - self.first, self.sinks.shape[2]))
        if n_sinks:
            self.sinks = self.sinks[:, :, n_sinks:].clone()
            self.first += n_sinks
        while self.runs and self.runs[0].first < position:
            run, *later = self.runs
            left_at = (
                run.end if run.end <= position else self._slot(position) if self.token_dim else run.first
            )
            if left_at <= run.first:
                return
            self.runs = [*self._last_of(run, left_at), *later]
            self.first = left_at
            if not self.runs:
                break
        n_exact = min(position - self.first, self.tail.shape[2])
        if not self.runs and n_exact > 0:
            self.tail = self.tail[:, :, n_exact:]
            if n_exact * 8 > self.tail.shape[2]:
                # While decoding a token leaves at a time, and the next `append` copies anyway.
                self.tail = self.tail.clone()
            self.first += n_exact

    def _last_of(self, run: Run, first: int) -> list[Run]:
        """A run's tokens from position ``first`` on, at which a block begins; none, if there are none."""
        if first >= run.end:
            return []
        assert self.token_dim is not None
        n_units = (first - (self._slot(run.first) if self.is_packed else run.first)) // self.granularity
        n_left = run.data.shape[self.token_dim] - n_units
        # A copy: a view would keep what is dropped alive.
        data = run.data.narrow(self.token_dim, n_units, n_left).contiguous().clone()
        return [Run(first, run.end - first, data)]

    def select(self, index: Tensor) -> None:
        batch = self.tail.shape[0]
        self.sinks, self.tail = self.sinks.index_select(0, index), self.tail.index_select(0, index)
        self.runs = [replace(run, data=self._select_run(run, index, batch)) for run in self.runs]

    def _select_run(self, run: Run, index: Tensor, batch: int) -> Any:
        tensors: list[Tensor] = []
        map_tensors(run.data, tensors.append)
        leads = bool(tensors) and all(t.dim() and t.shape[0] == batch for t in tensors)
        if leads and self.token_dim is not None:
            return map_tensors(run.data, lambda t: t.index_select(0, index))
        wanted = self._expand(run, run.first, run.end).index_select(0, index)
        if leads:
            # The first dimension is as long as the batch; whether it is the batch, only expanding can tell.
            selected = map_tensors(run.data, lambda t: t.index_select(0, index))
            if self._stands_for(replace(run, data=selected), wanted):
                return selected
        # A stored form without a leading batch dimension can only be selected as what it stands for.
        return self.compressor.compress(wanted)

    def _stands_for(self, run: Run, wanted: Tensor) -> bool:
        try:
            expanded = self._expand(run, run.first, run.end)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # a user's expand() that finds its stored form broken
        # Other batch sizes may sum in another order.
        return expanded.shape == wanted.shape and torch.allclose(expanded, wanted, rtol=1e-3, atol=1e-4)

    @property
    def _codec(self) -> StreamSetCodec | None:
        """What packs blocks that other stores read too. A subclass may pack something else."""
        return self.compressor.native if type(self.compressor) is StreamSetCompressor else None

    def export(self, row: int) -> list[Block]:
        """See `Store.export`. On another device than the CPU the bytes are copied.

        Raises:
            BlockError: what is coded here is no blocks, or they have no name.
        """
        if not self.is_coded:
            return []
        if self._codec is None:
            raise BlockError(
                f"a {type(self.compressor).__name__} does not pack blocks; only a preset's codecs do"
            )
        if self._codec.id is None:
            raise BlockError(UNNAMED)
        if not self.runs:
            return []
        slot, packed = self._slot(self.coded_at), self.runs[0].data[row].cpu().contiguous()
        name = self._codec.id
        return [Block(*name, slot + at * self.granularity, data) for at, data in enumerate(packed)]

    def export_parts(self) -> SideParts:
        blocks = [self.export(row) for row in range(self.tail.shape[0])]
        # Copies: nobody may reach into the store through them.
        return SideParts(self.first, self.sinks.clone(), blocks, self.tail.clone())

    def saved_parts(self) -> SideParts | SideRuns:
        """See `Store.saved_parts`."""
        if self._codec is not None or not self.is_coded:
            return self.export_parts()
        return SideRuns(self.first, self.sinks, list(self.runs), self.tail)

    def place(self, side: Side) -> Place:
        return Place(side, self.tail[:, :, :0], self.n_sinks, self._codec)

    def import_parts(self, parts: SideParts | SideRuns, side: Side) -> None:
        """See `Store.import_parts`, of an empty side.

        Raises:
            BlockError, ShapeError, DtypeError: parts that do not fit.
        """
        device, sinks, tail = self.tail.device, parts.sinks.detach().clone(), parts.tail.detach().clone()
        place, coded_at = self.place(side), parts.first + int(sinks.shape[2])
        if isinstance(parts, SideRuns):
            self._check_runs(parts, place)
            runs = list(parts.runs)
        else:
            end = place.end_of(parts)
            place.check_blocks(parts, dict(enumerate(parts.blocks)))
            runs = []
            if any(parts.blocks):
                packed = torch.stack([torch.stack([block.data for block in row]) for row in parts.blocks])
                runs = [Run(coded_at, end - int(tail.shape[2]) - coded_at, packed.to(device))]
        self.first, self.sinks, self.runs, self.tail = parts.first, sinks, runs, tail

    def _check_runs(self, parts: SideRuns, place: Place) -> None:
        """Refuse coded tokens that this side's compressor has not made, as far as they show it."""
        place.check_states("sinks", parts.sinks)
        place.check_states("tail", parts.tail)
        if not self.is_coded or self._codec is not None:
            raise BlockError(
                f"the {place.side}s were coded by a compressor that packs no blocks, this layer's "
                f"{type(self.compressor).__name__} is another; load them into a layer with the same compressor"
            )
        if self.token_dim is not None and len(parts.runs) > 1:
            raise ShapeError(
                f"the {place.side}s have {len(parts.runs)} runs, expected one; save the cache again"
            )
        batch, heads, _, dim = self.tail.shape
        for run in parts.runs:
            n_tokens, end = run.n_tokens, run.end
            if self.token_dim is not None:
                start = self._slot(run.first) if self.is_packed else run.first
                n_tokens, end = (
                    int(run.data.shape[self.token_dim]) * self.granularity,
                    start + self.granularity,
                )
                n_tokens -= run.first - start
            if n_tokens == run.n_tokens:
                # Of one that is long the first tokens show as much as all.
                tokens = self._expand(run, run.first, end)
                if tokens.shape == (batch, heads, end - run.first, dim):
                    continue
            raise ShapeError(
                f"{run.n_tokens} coded {place.side}s from position {run.first} on are not stored as this layer's "
                f"{type(self.compressor).__name__} stores them; save the cache again"
            )

    def copy(self) -> ForeignSide:
        twin = object.__new__(ForeignSide)
        twin.__dict__.update(self.__dict__)
        twin.runs = list(self.runs)
        return twin
