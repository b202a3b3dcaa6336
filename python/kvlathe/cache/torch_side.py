"""One side, keys or values, of a layer held as torch tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compressors import granularity, native_codec
from .nested_tensors import map_tensors

# Tokens that a user's compressor gets at once: one call a token would be slow.
_RUN_LEN = 32


@dataclass(frozen=True)
class Run:
    """Coded tokens, as one call of `compress` (or several, joined) gave them."""

    n_tokens: int
    data: Any


class TorchSide:
    """Keys or values of a `TorchStore`."""

    def __init__(self, compressor: nn.Module, n_sinks: int, empty: Tensor) -> None:
        self.compressor: Any = compressor
        self.is_coded = native_codec(compressor) is not None
        self.n_sinks = n_sinks if self.is_coded else 0
        # Stored forms of a known layout are joined to one run; a user's are kept run by run.
        self.token_dim: int | None = getattr(compressor, "coded_token_dim", None)
        known = self.token_dim is not None or not self.is_coded
        self.granularity = granularity(compressor) if known else _RUN_LEN
        self.sinks, self.tail = empty, empty
        self.runs: list[Run] = []
        # Position of the first token held; above 0 only in a sliding window (`window_store`).
        self.first = 0

    @property
    def n_coded(self) -> int:
        return sum(run.n_tokens for run in self.runs)

    @property
    def n_tokens(self) -> int:
        return self.first + self.sinks.shape[2] + self.n_coded + self.tail.shape[2]

    def append(self, x: Tensor) -> None:
        begins = not self.runs and not self.tail.shape[2]
        to_sinks = max(0, min(self.n_sinks - self.first - self.sinks.shape[2], x.shape[2])) if begins else 0
        if to_sinks:
            self.sinks = torch.cat([self.sinks, x[:, :, :to_sinks]], dim=2)
        self.tail = torch.cat([self.tail, x[:, :, to_sinks:]], dim=2)

    def _compress(self, x: Tensor, position: int) -> Any:
        if self.token_dim == 1:
            return self.compressor.compress(x, position)
        return self.compressor.compress(x)

    def _expand(self, run: Run, position: int) -> Tensor:
        if self.token_dim == 1:
            return self.compressor.expand(run.data, position, self.tail.dtype)
        if self.token_dim == 2:
            return self.compressor.expand(run.data, self.tail.dtype)
        return self.compressor.expand(run.data).to(self.tail.dtype)

    def code(self, n_tokens: int) -> None:
        position = self.first + self.sinks.shape[2] + self.n_coded
        x, tail = self.tail[:, :, :n_tokens].contiguous(), self.tail[:, :, n_tokens:].clone()
        if self.token_dim is None:
            new = [Run(part.shape[2], self._compress(part, 0)) for part in x.split(self.granularity, dim=2)]
            self.runs = [*self.runs, *new]
        else:
            data = self._compress(x, position)
            if self.runs:
                data = torch.cat([self.runs[0].data, data], dim=self.token_dim)
            self.runs = [Run(self.n_coded + n_tokens, data)]
        self.tail = tail

    def read(self, room: int) -> Tensor:
        parts, position = [self.sinks], self.first + self.sinks.shape[2]
        for run in self.runs:
            parts.append(self._expand(run, position))
            position += run.n_tokens
        parts.append(self.tail)
        batch, heads, _, dim = self.tail.shape
        parts.append(self.tail.new_empty(batch, heads, room, dim))
        return torch.cat(parts, dim=2)

    def crop(self, n_tokens: int) -> None:
        left = n_tokens - self.tail.shape[2]
        if left <= 0:
            self.tail = self.tail[:, :, : self.tail.shape[2] - n_tokens]
            return
        self.tail = self.tail[:, :, :0]
        while left > 0 and self.runs:
            left = self._crop_last_run(left)
        if left > 0:
            self.sinks = self.sinks[:, :, : self.sinks.shape[2] - left]

    def forget_before(self, position: int) -> None:
        """Drop tokens before ``position``; of coded ones only whole blocks, so some of them may stay."""
        n_sinks = max(0, min(position - self.first, self.sinks.shape[2]))
        if n_sinks:
            self.sinks = self.sinks[:, :, n_sinks:].clone()
            self.first += n_sinks
        while self.runs and self.first < position:
            run, *later = self.runs
            unit = run.n_tokens if self.token_dim is None else self.granularity
            n_units = min(position - self.first, run.n_tokens) // unit
            if not n_units:
                return
            n_left = run.n_tokens - n_units * unit
            kept = []
            if n_left:
                assert self.token_dim is not None
                # A copy: a view would keep what is dropped alive.
                kept = [
                    Run(n_left, run.data.narrow(self.token_dim, n_units, n_left // unit).contiguous().clone())
                ]
            self.runs = [*kept, *later]
            self.first += n_units * unit
        n_exact = min(position - self.first, self.tail.shape[2])
        if not self.runs and n_exact > 0:
            self.tail = self.tail[:, :, n_exact:]
            if n_exact * 8 > self.tail.shape[2]:
                # While decoding a token leaves at a time, and the next `append` copies anyway.
                self.tail = self.tail.clone()
            self.first += n_exact

    def _crop_last_run(self, n_tokens: int) -> int:
        """Remove tokens of the last run, the rest of a cut block going to the tail; returns what is left to remove."""
        run = self.runs.pop()
        kept = run.n_tokens - n_tokens
        if kept <= 0:
            return -kept
        if self.token_dim is None:
            self.tail = self._expand(run, 0)[:, :, :kept]
            return 0
        block_len = self.granularity
        whole = kept // block_len
        data = run.data.narrow(self.token_dim, 0, whole)
        if kept % block_len:
            cut = Run(block_len, run.data.narrow(self.token_dim, whole, 1))
            position = self.first + self.sinks.shape[2] + whole * block_len
            self.tail = self._expand(cut, position)[:, :, : kept % block_len]
        if whole:
            self.runs = [Run(whole * block_len, data)]
        return 0

    def select(self, index: Tensor) -> None:
        batch = self.tail.shape[0]
        self.sinks, self.tail = self.sinks.index_select(0, index), self.tail.index_select(0, index)
        self.runs = [Run(run.n_tokens, self._select_run(run, index, batch)) for run in self.runs]

    def _select_run(self, run: Run, index: Tensor, batch: int) -> Any:
        tensors: list[Tensor] = []
        map_tensors(run.data, tensors.append)
        leads = bool(tensors) and all(t.dim() and t.shape[0] == batch for t in tensors)
        if leads and self.token_dim is not None:
            return map_tensors(run.data, lambda t: t.index_select(0, index))
        wanted = self._expand(run, 0).index_select(0, index)
        if leads:
            # The first dimension is as long as the batch; whether it is the batch, only expanding can tell.
            selected = map_tensors(run.data, lambda t: t.index_select(0, index))
            if self._stands_for(Run(run.n_tokens, selected), wanted):
                return selected
        # A stored form without a leading batch dimension can only be selected as what it stands for.
        return self._compress(wanted, 0)

    def _stands_for(self, run: Run, wanted: Tensor) -> bool:
        try:
            expanded = self._expand(run, 0)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # a user's expand() that finds its stored form broken
        # Other batch sizes may sum in another order.
        return expanded.shape == wanted.shape and torch.allclose(expanded, wanted, rtol=1e-3, atol=1e-4)

    def copy(self) -> TorchSide:
        twin = object.__new__(TorchSide)
        twin.__dict__.update(self.__dict__)
        twin.runs = list(self.runs)
        return twin
