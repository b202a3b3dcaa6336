"""A layer's tokens in native memory, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import NativeLayer, StreamSetCodec
from ..errors import BlockError
from ..openmp import share_torch_threads
from ..preset import Side
from . import sections
from .block import BlockRow, native_row
from .fit import Place, check_ends
from .parts import SideParts, SideRuns
from .store import Attention, Policy

share_torch_threads()


class NativeStore:
    """A `Store` on the native cache; CPU tensors in float32, bfloat16 or float16.

    Args:
        key_codec, value_codec: None for a side that stays exact.
    """

    def __init__(
        self,
        key_codec: StreamSetCodec | None,
        value_codec: StreamSetCodec | None,
        policy: Policy,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        batch, n_heads, _, key_dim = keys.shape
        self.policy = policy
        self._codecs = key_codec, value_codec
        self._dims = (n_heads, key_dim, values.shape[-1])
        self._dtype = keys.dtype
        self._layer = NativeLayer(
            key_codec,
            value_codec,
            n_sinks=policy.n_sinks,
            compress_start_len=policy.compress_start_len,
            n_tail=policy.n_tail,
            window=policy.window,
            dtype=str(keys.dtype),
            batch=batch,
            n_heads=n_heads,
            dims=(key_dim, values.shape[-1]),
        )
        self.attends_packed = self._layer.can_attend
        self.is_exact = key_codec is None and value_codec is None
        is_calibrated = key_codec is not None and value_codec is not None
        self.why_expanded = None
        if is_calibrated and not self.attends_packed:
            self.why_expanded = "packed tokens are attended to where head_dim is a multiple of 8 only"

    @property
    def n_tokens(self) -> int:
        return self._layer.n_tokens

    @property
    def first(self) -> int:
        return self._layer.first

    @property
    def n_coded(self) -> int:
        return self._layer.n_coded

    @property
    def batch(self) -> int:
        return self._layer.batch

    def append(self, keys: Tensor, values: Tensor) -> None:
        if keys.stride(-1) != 1:
            keys = keys.contiguous()
        if values.stride(-1) != 1:
            values = values.contiguous()
        self._layer.append(keys, values)

    def compress(self) -> None:
        self._layer.compress(torch.get_num_threads())

    def settle(self) -> None:
        self._layer.settle(torch.get_num_threads())

    def forget(self) -> None:
        self._layer.forget()

    def would_settle(self) -> bool:
        return self._layer.would_settle()

    def read(self, first: int, end: int, *, n_tokens: int, room: int = 0) -> tuple[Tensor, Tensor]:
        n_heads, key_dim, value_dim = self._dims
        keys, values = (
            torch.empty(self.batch, n_heads, end - first + room, dim, dtype=self._dtype)
            for dim in (key_dim, value_dim)
        )
        if first < end:
            self._layer.read(
                keys, values, tokens=(first, end), n_tokens=n_tokens, n_threads=torch.get_num_threads()
            )
        return keys, values

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
        n_kv_heads, key_dim, value_dim = self._dims
        batch, n_query_heads, n_queries, _ = queries.shape
        plain = softcap is None and sink_scores is None and key_dim == value_dim
        if not self.attends_packed or (n_queries > 1 and plain and sections.pays(queries, n_kv_heads)):
            return sections.attend(
                self, queries, n_kv_heads, n_tokens=n_tokens, mask=mask, scaling=scaling, softcap=softcap,
                sink_scores=sink_scores,
            )  # fmt: skip
        out = torch.empty(batch, n_queries, n_query_heads, value_dim, dtype=self._dtype)
        lse = torch.empty(batch, n_query_heads, n_queries)
        self._layer.attend(
            queries if queries.stride(-1) == 1 else queries.contiguous(),
            out,
            lse,
            n_tokens=n_tokens,
            mask=None if mask is None else mask[:, 0].contiguous().view(torch.uint8),
            scaling=scaling,
            softcap=softcap,
            sink_scores=None if sink_scores is None else sink_scores.float().tolist(),
            n_threads=torch.get_num_threads(),
        )
        return Attention(out, lse)

    def crop(self, n_tokens: int) -> None:
        self._layer.crop(n_tokens)

    def select(self, rows: list[int]) -> None:
        self._layer.select(rows)

    def export(self, row: int, side: Side) -> BlockRow:
        return BlockRow(self._layer.export(row, side))

    def export_parts(self, side: Side) -> SideParts:
        first, coded_at, tail_at = self._layer.positions(side)
        at, n_tokens = side == "value", self.n_tokens
        sinks, tail = (
            self.read(start, end, n_tokens=n_tokens)[at]
            for start, end in ((first, coded_at), (tail_at, n_tokens))
        )
        return SideParts(first, sinks, [self.export(row, side) for row in range(self.batch)], tail)

    def saved_parts(self, side: Side) -> SideParts:
        return self.export_parts(side)

    def import_parts(self, keys: SideParts | SideRuns, values: SideParts | SideRuns) -> None:
        ends, native = [], []
        sides: list[tuple[Side, SideParts | SideRuns]] = [("key", keys), ("value", values)]
        for side, parts in sides:
            if not isinstance(parts, SideParts):
                raise BlockError(
                    f"the {side}s were coded by a compressor that packs no blocks, and this layer's does; load them "
                    f"into a layer with the same compressor"
                )
            place = self._place(side)
            ends.append(place.end_of(parts))
            # Rows of native memory are checked there.
            place.check_blocks(
                parts, {n: row for n, row in enumerate(parts.blocks) if not isinstance(row, BlockRow)}
            )
            blocks = [native_row(row) for row in parts.blocks]
            sinks, tail = (states.detach().contiguous() for states in (parts.sinks, parts.tail))
            native.append((parts.first, sinks, blocks, tail))
        check_ends((ends[0], ends[1]), (keys.first, values.first), self.policy)
        self._layer.import_parts(*native)

    def _place(self, side: Side) -> Place:
        at, (n_heads, *dims) = side == "value", self._dims
        codec = self._codecs[at]
        like = torch.empty(self.batch, n_heads, 0, dims[at], dtype=self._dtype)
        return Place(side, like, self.policy.n_sinks if codec is not None else 0, codec)

    def memory_use(self) -> tuple[int, int, int]:
        return self._layer.memory_use()

    def copy(self) -> NativeStore:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._layer = self._layer.copy()
        return twin

    def mark(self) -> int:
        return self.n_tokens

    def return_to(self, mark: int) -> None:
        # What was appended is still in the tail, as no call codes or forgets a part of what is due: nothing is lost.
        self._layer.crop(self.n_tokens - mark)
