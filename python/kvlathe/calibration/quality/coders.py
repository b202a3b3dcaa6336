"""What a compressed cache gives back of keys and values, as functions of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...cache import CompressedDynamicCache
from ...compressors import IdentityCompressor, StreamSetCompressor, granularity
from .two_sided_kernel import Coder


def with_coded(x: Tensor, start: int, end: int, code: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` [B, H, T, D] with its tokens ``start`` to ``end`` as ``code`` gives them back; itself if there are none."""
    if end <= start:
        return x
    coded = code(x[:, :, start:end].contiguous())
    return torch.cat([x[:, :, :start], coded.to(x.dtype), x[:, :, end:]], dim=2)


def blocks_end(block_len: int, start: int, end: int) -> int:
    """Where the last whole block ends of those that hold tokens from position ``start`` on, before ``end``.

    Blocks begin at multiples of their length. ``start`` if there is none.
    """
    return max(start, end // block_len * block_len)


def read_back(compressor: nn.Module, x: Tensor, position: int) -> Tensor:
    """What a compressor gives back of tokens [B, H, T, D] from a position on, which end with a block."""
    if isinstance(compressor, StreamSetCompressor):
        # As a cache does it: slots of the first block whose tokens are sinks are zero vectors.
        n_placeholders = position % compressor.block_len
        slot = position - n_placeholders
        coded = compressor.compress(nn.functional.pad(x, (0, 0, n_placeholders, 0)), slot)
        return compressor.expand(coded, slot, x.dtype)[:, :, n_placeholders:]
    expand: Callable[..., Tensor] = compressor.expand  # type: ignore[assignment]
    return expand(compressor.compress(x)).to(x.dtype)  # type: ignore[operator]


def coders(cache: CompressedDynamicCache) -> tuple[Coder, Coder]:
    """What an (empty) cache's compressors make of keys and of values: the arguments of `Evaluator.run`.

    Tokens are coded from the first one after the sinks on, in whole blocks; an incomplete last block, which a cache
    would keep in its tail, stays exact.
    """
    return (
        lambda layer, x: _through(cache.compressor(layer, "key"), cache.n_sinks(layer), x),
        lambda layer, x: _through(cache.compressor(layer, "value"), cache.n_sinks(layer), x),
    )


def _through(compressor: nn.Module, n_sinks: int, x: Tensor) -> Tensor:
    if type(compressor) is IdentityCompressor:
        return x
    end = blocks_end(granularity(compressor), n_sinks, x.shape[2])
    return with_coded(x, n_sinks, end, lambda run: read_back(compressor, run, n_sinks))
