"""A layer's tokens in native memory, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import NativeLayer
from ..openmp import share_torch_threads
from . import section_attention
from .layer_store import Policy

share_torch_threads()


class NativeStore:
    """A `LayerStore` on the native cache; CPU tensors in float32, bfloat16 or float16."""

    # Tokens that a query sees, its own included; None: all of them.
    _window: int | None = None

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
        """The tokens that the next query sees, [B, H, tokens + room, D]."""
        n_tokens = self.n_tokens
        return self._read(self._first_seen(n_tokens), n_tokens, n_tokens, room)

    def _first_seen(self, n_past: int) -> int:
        """Position of the first token that a query behind ``n_past`` tokens sees."""
        return 0 if self._window is None else max(0, n_past + 1 - self._window)

    def _read(self, first: int, end: int, n_tokens: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens from ``first`` on, to the ``end``-th, of ``n_tokens`` that must be held, and room for more."""
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
        """Attention from the packed blocks, or for many queries from sections of them that are expanded: queries
        [B, Hq, q, D] to [B, q, Hq, D].

        Args:
            n_tokens: as many as the caller has seen; with another number held it is refused.
            mask: bool [1 or B, 1, q, tokens], True = seen, its tokens all, or in a sliding window the last ones, those
                that any query sees; None is causal, the last query at the last token.
        """
        n_kv_heads, key_dim, value_dim = self._dims
        batch, n_query_heads, n_queries, _ = queries.shape
        if n_queries > 1 and section_attention.pays(queries, n_kv_heads):
            plain = softcap is None and sink_scores is None and key_dim == value_dim
            first_seen = self._first_seen(n_tokens - n_queries)
            n_seen = n_tokens - first_seen
            # A mask of another shape is refused below.
            fits = mask is not None and mask.dtype == torch.bool and mask.shape[1:] == (1, n_queries, n_seen)
            if plain and (fits or (mask is None and self._window is None)):
                return section_attention.attend(
                    queries,
                    lambda first, end: self._read(first_seen + first, first_seen + end, n_tokens),
                    n_tokens=n_seen,
                    n_kv_heads=n_kv_heads,
                    mask=mask,
                    scaling=scaling,
                )
        out = torch.empty(batch, n_queries, n_query_heads, value_dim, dtype=self._dtype)
        self._layer.attend(
            queries if queries.stride(-1) == 1 else queries.contiguous(),
            out,
            n_tokens=n_tokens,
            window=self._window,
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
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._layer = self._layer.copy()
        return twin

    def mark(self) -> int:
        return self.n_tokens

    def return_to(self, mark: int) -> None:
        # What was appended is still in the tail, as no call codes or forgets a part of what is due: nothing is lost.
        self._layer.crop(self.n_tokens - mark)
