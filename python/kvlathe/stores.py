"""Where a layer keeps its tokens: natively on the CPU, or as torch tensors on any device.

Both keep the same layout, ``sinks | coded | tail``, and follow the same rules: tokens enter at the tail and leave
it in whole blocks, a crop into coded tokens puts the rest of their block back into the tail as decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._native import NativeLayer
from .compressors import NATIVE_DTYPES, check_fits, granularity, native_codec
from .errors import NonFiniteError
from .openmp import share_torch_threads
from .torch_codec import MAX_MAGNITUDE

share_torch_threads()

# Tokens that a user's compressor gets at once: one call a token would be slow.
_RUN_LEN = 32


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
        """What `return_to` needs to undo the calls of `append` that follow, unless one of them was coded."""

    def return_to(self, mark: Any) -> None: ...


def make_store(
    k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
) -> LayerStore:
    """An empty store for tensors like ``keys`` and ``values``."""
    key_codec, value_codec = native_codec(k_compressor), native_codec(v_compressor)
    on_cpu = keys.device.type == "cpu" and keys.dtype in NATIVE_DTYPES
    if on_cpu and key_codec is not False and value_codec is not False:
        return NativeStore(key_codec, value_codec, policy, keys, values)
    return TorchStore(k_compressor, v_compressor, policy, keys, values)


class NativeStore:
    """A `LayerStore` on the native cache; CPU tensors in float32, bfloat16 or float16."""

    def __init__(
        self, key_codec: Any, value_codec: Any, policy: Policy, keys: Tensor, values: Tensor
    ) -> None:
        batch, n_heads, _, key_dim = keys.shape
        self._dims = (n_heads, key_dim, values.shape[-1])
        self._dtype = keys.dtype
        self._layer = NativeLayer(
            key_codec,
            value_codec,
            n_sinks=policy.n_sinks,
            compress_start_len=policy.compress_start_len,
            n_tail=policy.n_tail,
            dtype=str(keys.dtype),
            batch=batch,
            n_heads=n_heads,
            dims=(key_dim, values.shape[-1]),
        )

    @property
    def n_tokens(self) -> int:
        return self._layer.n_tokens

    @property
    def n_coded(self) -> int:
        return self._layer.n_coded

    @property
    def batch(self) -> int:
        return self._layer.batch

    def append(self, keys: Tensor, values: Tensor) -> None:
        keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (keys, values))
        self._layer.append(keys, values)

    def compress(self) -> None:
        self._layer.compress(torch.get_num_threads())

    def read(self, room: int = 0) -> tuple[Tensor, Tensor]:
        n_heads, key_dim, value_dim = self._dims
        length = self.n_tokens + room
        keys = torch.empty(self.batch, n_heads, length, key_dim, dtype=self._dtype)
        values = torch.empty(self.batch, n_heads, length, value_dim, dtype=self._dtype)
        if self.n_tokens:
            self._layer.read(keys, values, torch.get_num_threads())
        return keys, values

    @property
    def can_attend(self) -> bool:
        return self._layer.can_attend

    def attend(
        self,
        queries: Tensor,
        *,
        n_tokens: int,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_scores: Tensor | None = None,
    ) -> Tensor:
        """Attention from the packed blocks: queries [B, Hq, q, D] to [B, q, Hq, D].

        Args:
            n_tokens: as many as the caller has seen; with another number held it is refused.
            mask: bool [1 or B, 1, q, n_tokens], True = seen; None is causal, the last query at the last token.
        """
        batch, n_query_heads, n_queries, _ = queries.shape
        out = torch.empty(batch, n_queries, n_query_heads, self._dims[2], dtype=self._dtype)
        self._layer.attend(
            queries if queries.stride(-1) == 1 else queries.contiguous(),
            out,
            n_tokens=n_tokens,
            mask=None if mask is None else mask[:, 0].contiguous().view(torch.uint8),
            scaling=scaling,
            softcap=softcap,
            sink_scores=None if sink_scores is None else sink_scores.float().tolist(),
            n_threads=torch.get_num_threads(),
        )
        return out

    def crop(self, n_tokens: int) -> None:
        self._layer.crop(n_tokens)

    def select(self, rows: list[int]) -> None:
        self._layer.select(rows)

    def memory_use(self) -> tuple[int, int]:
        return self._layer.memory_use()

    def copy(self) -> NativeStore:
        twin = object.__new__(NativeStore)
        twin.__dict__.update(self.__dict__)
        twin._layer = self._layer.copy()
        return twin

    def mark(self) -> int:
        return self.n_tokens

    def return_to(self, mark: int) -> None:
        # What was appended is still in the tail, as no call codes a part of what is due: nothing is lost with it.
        self._layer.crop(self.n_tokens - mark)


class TorchStore:
    """A `LayerStore` of torch tensors: any device, any compressor."""

    can_attend = False

    def __init__(
        self, k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
    ) -> None:
        check_fits(k_compressor, keys, "keys")
        check_fits(v_compressor, values, "values")
        self._policy = policy
        self._sides = [
            # New tensors, not views: an empty view would keep the prompt's whole tensor alive.
            _Side(compressor, policy.n_sinks, torch.empty_like(tensor[:, :, :0]))
            for compressor, tensor in ((k_compressor, keys), (v_compressor, values))
        ]
        self._granularity = max(side.granularity for side in self._sides)

    @property
    def n_tokens(self) -> int:
        return self._sides[0].n_tokens

    @property
    def n_coded(self) -> int:
        return max(side.n_coded for side in self._sides)

    @property
    def batch(self) -> int:
        return self._sides[0].tail.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> None:
        for side, tensor, name in zip(self._sides, (keys, values), ("keys", "values"), strict=True):
            if side.is_coded and not bool((tensor.abs() <= MAX_MAGNITUDE).all()):
                raise NonFiniteError(f"{name} hold NaN, infinity or a magnitude above {MAX_MAGNITUDE:g}")
        with self._both_or_none() as sides:
            for side, tensor in zip(sides, (keys, values), strict=True):
                side.append(tensor.detach())

    @contextmanager
    def _both_or_none(self) -> Iterator[list[_Side]]:
        """Copies of both sides to be changed, which take their places if nothing goes wrong."""
        sides = [side.copy() for side in self._sides]
        yield sides
        self._sides = sides

    def compress(self) -> None:
        if self.n_tokens <= self._policy.compress_start_len:
            return
        with self._both_or_none() as sides:
            for side in sides:
                spare = side.tail.shape[2] - self._policy.n_tail
                if side.is_coded and spare >= self._granularity:
                    side.code(spare // self._granularity * self._granularity)

    def read(self, room: int = 0) -> tuple[Tensor, Tensor]:
        keys, values = (side.read(room) for side in self._sides)
        return keys, values

    def crop(self, n_tokens: int) -> None:
        with self._both_or_none() as sides:
            for side in sides:
                side.crop(n_tokens)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self._sides[0].tail.device)
        with self._both_or_none() as sides:
            for side in sides:
                side.select(index)

    def memory_use(self) -> tuple[int, int]:
        exact = sum(_bytes_of(t) for side in self._sides for t in (side.sinks, side.tail))
        coded = sum(_bytes_of(run.data) for side in self._sides for run in side.runs)
        return exact, coded

    def copy(self) -> TorchStore:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # Tensors are replaced, never written to, so copies may share them.
        twin._sides = [side.copy() for side in self._sides]
        return twin

    def mark(self) -> list[_Side]:
        return self._sides

    def return_to(self, mark: list[_Side]) -> None:
        self._sides = mark


@dataclass(frozen=True)
class _Run:
    """Coded tokens, as one call of `compress` (or several, joined) gave them."""

    n_tokens: int
    data: Any


class _Side:
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
        self.runs: list[_Run] = []
        # Position of the first token held; above 0 only in a sliding window (`kvlathe.window`), which has no sinks.
        self.first = 0

    @property
    def n_coded(self) -> int:
        return sum(run.n_tokens for run in self.runs)

    @property
    def n_tokens(self) -> int:
        return self.first + self.sinks.shape[2] + self.n_coded + self.tail.shape[2]

    def append(self, x: Tensor) -> None:
        to_sinks = max(0, min(self.n_sinks - self.sinks.shape[2], x.shape[2]))
        if to_sinks:
            self.sinks = torch.cat([self.sinks, x[:, :, :to_sinks]], dim=2)
        self.tail = torch.cat([self.tail, x[:, :, to_sinks:]], dim=2)

    def _compress(self, x: Tensor, position: int) -> Any:
        if self.token_dim == 1:
            return self.compressor.compress(x, position)
        return self.compressor.compress(x)

    def _expand(self, run: _Run, position: int) -> Tensor:
        if self.token_dim == 1:
            return self.compressor.expand(run.data, position, self.tail.dtype)
        if self.token_dim == 2:
            return self.compressor.expand(run.data, self.tail.dtype)
        return self.compressor.expand(run.data).to(self.tail.dtype)

    def code(self, n_tokens: int) -> None:
        position = self.first + self.sinks.shape[2] + self.n_coded
        x, tail = self.tail[:, :, :n_tokens].contiguous(), self.tail[:, :, n_tokens:].clone()
        if self.token_dim is None:
            new = [_Run(part.shape[2], self._compress(part, 0)) for part in x.split(self.granularity, dim=2)]
            self.runs = [*self.runs, *new]
        else:
            data = self._compress(x, position)
            if self.runs:
                data = torch.cat([self.runs[0].data, data], dim=self.token_dim)
            self.runs = [_Run(self.n_coded + n_tokens, data)]
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
                    _Run(
                        n_left, run.data.narrow(self.token_dim, n_units, n_left // unit).contiguous().clone()
                    )
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
            cut = _Run(block_len, run.data.narrow(self.token_dim, whole, 1))
            position = self.first + self.sinks.shape[2] + whole * block_len
            self.tail = self._expand(cut, position)[:, :, : kept % block_len]
        if whole:
            self.runs = [_Run(whole * block_len, data)]
        return 0

    def select(self, index: Tensor) -> None:
        batch = self.tail.shape[0]
        self.sinks, self.tail = self.sinks.index_select(0, index), self.tail.index_select(0, index)
        self.runs = [_Run(run.n_tokens, self._select_run(run, index, batch)) for run in self.runs]

    def _select_run(self, run: _Run, index: Tensor, batch: int) -> Any:
        tensors: list[Tensor] = []
        _map_tensors(run.data, tensors.append)
        leads = bool(tensors) and all(t.dim() and t.shape[0] == batch for t in tensors)
        if leads and self.token_dim is not None:
            return _map_tensors(run.data, lambda t: t.index_select(0, index))
        wanted = self._expand(run, 0).index_select(0, index)
        if leads:
            # The first dimension is as long as the batch; whether it is the batch, only expanding can tell.
            selected = _map_tensors(run.data, lambda t: t.index_select(0, index))
            if self._stands_for(_Run(run.n_tokens, selected), wanted):
                return selected
        # A stored form without a leading batch dimension can only be selected as what it stands for.
        return self._compress(wanted, 0)

    def _stands_for(self, run: _Run, wanted: Tensor) -> bool:
        try:
            expanded = self._expand(run, 0)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # a user's expand() that finds its stored form broken
        # Other batch sizes may sum in another order.
        return expanded.shape == wanted.shape and torch.allclose(expanded, wanted, rtol=1e-3, atol=1e-4)

    def copy(self) -> _Side:
        twin = object.__new__(_Side)
        twin.__dict__.update(self.__dict__)
        twin.runs = list(self.runs)
        return twin


def _map_tensors(data: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor of a nested tuple, list, dict or dataclass."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: _map_tensors(value, function) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_map_tensors(value, function) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(_map_tensors(value, function) for value in data)
    if is_dataclass(data) and not isinstance(data, type):
        twin = copy.copy(data)
        for field in fields(data):
            object.__setattr__(twin, field.name, _map_tensors(getattr(data, field.name), function))
        return twin
    return data


def _bytes_of(data: Any) -> int:
    total = 0

    def add(tensor: Tensor) -> None:
        nonlocal total
        total += tensor.numel() * tensor.element_size()

    _map_tensors(data, add)
    return total
