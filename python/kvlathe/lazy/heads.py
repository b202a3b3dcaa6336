"""Which KV head stands where in lazy keys or values, and which views of them can be told from sizes alone.

Between `update` and attention, models only rearrange heads: they repeat each KV head for its group of query heads. Such
views change nothing but an index, which is kept here in place of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_KEPT = 256


@dataclass(frozen=True)
class Heads:
    """The dimensions of a tensor [B, *heads, T, D] that tell heads apart.

    Attributes:
        shape: sizes of those dimensions; (H,) as the cache hands keys out.
        kv_heads: the KV head at each place, in C order.
    """

    shape: tuple[int, ...]
    kv_heads: tuple[int, ...]

    def _grid(self) -> np.ndarray:
        return np.array(self.kv_heads, dtype=np.int64).reshape(self.shape)

    @classmethod
    def _of(cls, grid: np.ndarray) -> Heads:
        return cls(tuple(grid.shape), tuple(int(head) for head in grid.ravel()))


@lru_cache(_MOST_KEPT)
def in_order(n_kv_heads: int) -> Heads:
    """Every KV head once."""
    return Heads((n_kv_heads,), tuple(range(n_kv_heads)))


@lru_cache(_MOST_KEPT)
def _expanded(heads: Heads, shape: tuple[int, ...]) -> Heads:
    return Heads._of(np.broadcast_to(heads._grid(), shape))


@lru_cache(_MOST_KEPT)
def _tiled(heads: Heads, times: tuple[int, ...]) -> Heads:
    return Heads._of(np.tile(heads._grid(), times))


@lru_cache(_MOST_KEPT)
def _repeated(heads: Heads, times: int, dim: int) -> Heads:
    return Heads._of(np.repeat(heads._grid(), times, axis=dim))


@lru_cache(_MOST_KEPT)
def query_order(kv_heads: tuple[int, ...], n_kv_heads: int) -> tuple[int, ...] | None:
    """The order in which query heads, which read these KV heads, stand in groups of one KV head after the other.

    Returns:
        One index a query head, () if they stand so already; None if KV heads serve unequal numbers of them.
    """
    counts = np.bincount(kv_heads, minlength=n_kv_heads)
    if not kv_heads or counts.min() != counts.max():
        return None
    order = np.argsort(kv_heads, kind="stable")
    return () if np.array_equal(order, np.arange(len(order))) else tuple(int(at) for at in order)


@lru_cache(_MOST_KEPT)
def serving(heads: Heads, n_query_heads: int, enable_gqa: bool) -> tuple[int, ...] | None:
    """The KV head that each query head reads, by the rules of torch's SDPA; None where those refuse."""
    if len(heads.shape) != 1:
        return None
    n_heads = heads.shape[0]
    if n_query_heads == n_heads:
        return heads.kv_heads
    if n_heads == 1:
        return heads.kv_heads * n_query_heads
    if enable_gqa and n_heads and n_query_heads % n_heads == 0:
        return _repeated(heads, n_query_heads // n_heads, 0).kv_heads
    return None


def _sizes(given: Sequence[Any]) -> tuple[int, ...] | None:
    """Sizes that a view was asked for, one by one or as a sequence; None for anything but numbers."""
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return tuple(given) if all(type(size) is int for size in given) else None


# Each takes the heads, the tensor's shape and the call's other arguments; None: the call does more than arrange heads.
def _getitem(heads: Heads, shape: Sequence[int], index: Any) -> Heads | None:
    """``x[:, :, None]`` and the like: nothing is left out, dimensions of size 1 are put in between heads."""
    if not isinstance(index, tuple):
        index = (index,)
    at = next((i for i, part in enumerate(index) if part is Ellipsis), None)
    if at is not None:
        n_left_out = len(shape) - sum(part is not None for part in index) + 1
        index = (*index[:at], *[slice(None)] * n_left_out, *index[at + 1 :])
    whole = slice(None)
    if not all(part is None or (isinstance(part, slice) and part == whole) for part in index):
        return None
    index = (*index, *[whole] * (len(shape) - sum(part is not None for part in index)))
    if len(index) < 4 or index[0] is None or index[-1] is None or index[-2] is None:
        return None
    sizes = iter(heads.shape)
    return Heads(tuple(1 if part is None else next(sizes) for part in index[1:-2]), heads.kv_heads)


def _unsqueeze(heads: Heads, shape: Sequence[int], dim: int) -> Heads | None:
    at = dim + len(shape) + 1 if dim < 0 else dim
    if not 1 <= at <= len(shape) - 2:
        return None
    return Heads((*heads.shape[: at - 1], 1, *heads.shape[at - 1 :]), heads.kv_heads)


def _expand(heads: Heads, shape: Sequence[int], *given: Any) -> Heads | None:
    sizes = _sizes(given)
    if sizes is None or len(sizes) != len(shape):
        return None
    sizes = tuple(held if size == -1 else size for size, held in zip(sizes, shape, strict=True))
    if sizes[0] != shape[0] or sizes[-2:] != tuple(shape[-2:]):
        return None
    fits = all(held in (1, size) for held, size in zip(shape, sizes, strict=True))
    return _expanded(heads, sizes[1:-2]) if fits else None


def _reshape(heads: Heads, shape: Sequence[int], *given: Any) -> Heads | None:
    sizes = _sizes(given)
    if sizes is None or len(sizes) < 4 or sizes.count(-1) > 1 or 0 in shape:
        return None
    known = math.prod(size for size in sizes if size != -1)
    if not known or math.prod(shape) % known:
        return None
    sizes = tuple(math.prod(shape) // known if size == -1 else size for size in sizes)
    if sizes[0] != shape[0] or sizes[-2:] != tuple(shape[-2:]) or math.prod(sizes) != math.prod(shape):
        return None
    return Heads(sizes[1:-2], heads.kv_heads)


def _flatten(heads: Heads, shape: Sequence[int], start_dim: int = 0, end_dim: int = -1) -> Heads | None:
    start, end = (dim + len(shape) if dim < 0 else dim for dim in (start_dim, end_dim))
    if not 1 <= start <= end <= len(shape) - 3:
        return None
    flat = math.prod(shape[start : end + 1])
    return Heads((*heads.shape[: start - 1], flat, *heads.shape[end:]), heads.kv_heads)


def _repeat(heads: Heads, shape: Sequence[int], *given: Any) -> Heads | None:
    times = _sizes(given)
    if times is None or len(times) != len(shape) or (times[0], *times[-2:]) != (1, 1, 1):
        return None
    return _tiled(heads, times[1:-2])


def _repeat_interleave(
    heads: Heads, shape: Sequence[int], repeats: Any, dim: int | None = None
) -> Heads | None:
    if type(repeats) is not int or dim is None:
        return None
    at = dim + len(shape) if dim < 0 else dim
    return _repeated(heads, repeats, at - 1) if 1 <= at <= len(shape) - 3 else None


def _same(heads: Heads, shape: Sequence[int], *given: Any) -> Heads | None:
    return None if given else heads


@dataclass(frozen=True)
class View:
    """A call that may only rearrange heads.

    Attributes:
        arrange: takes the heads, the tensor's shape and the call's other arguments.
        names: of arguments that it takes by name.
    """

    arrange: Callable[..., Heads | None]
    names: frozenset[str] = frozenset()

    def arranged(
        self, heads: Heads, shape: Sequence[int], given: tuple[Any, ...], named: dict[str, Any]
    ) -> Heads | None:
        """How heads are arranged after the call; None if that is not all that it does."""
        return self.arrange(heads, shape, *given, **named) if self.names.issuperset(named) else None


_SAME, _EXPAND, _RESHAPE, _TILE = View(_same), View(_expand), View(_reshape), View(_repeat)
_FLATTEN = View(_flatten, frozenset(["start_dim", "end_dim"]))
_UNSQUEEZE = View(_unsqueeze, frozenset(["dim"]))
_INTERLEAVE = View(_repeat_interleave, frozenset(["repeats", "dim"]))

VIEWS: dict[Callable[..., Tensor], View] = {
    Tensor.__getitem__: View(_getitem),
    Tensor.contiguous: _SAME,
    Tensor.detach: _SAME,
    Tensor.expand: _EXPAND,
    Tensor.flatten: _FLATTEN,
    Tensor.repeat: _TILE,
    Tensor.repeat_interleave: _INTERLEAVE,
    Tensor.reshape: _RESHAPE,
    Tensor.unsqueeze: _UNSQUEEZE,
    Tensor.view: _RESHAPE,
    torch.detach: _SAME,
    torch.flatten: _FLATTEN,
    torch.repeat_interleave: _INTERLEAVE,
    torch.reshape: _RESHAPE,
    torch.unsqueeze: _UNSQUEEZE,
}
