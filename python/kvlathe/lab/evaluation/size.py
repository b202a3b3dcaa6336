"""How many bytes a cache takes at a stated length, exact parts and all overhead included.

    bits a value = 8 · bytes / (2 · layers · KV heads · head_dim · tokens)

Exact tokens count 2 bytes a value for every method alike, whatever the model computes in. What all caches of a model
share (the basis) is stated apart. Sliding windows are ignored: every layer is counted at the full length.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...calibration.rope_probe import ModelShape
from ...preset import Side
from .method import Method

SIDES: tuple[Side, Side] = ("key", "value")
_EXACT_VALUE_BYTES = 2


def exact_token_bytes(shape: ModelShape) -> int:
    """Bytes of one side of one exact token in one layer."""
    return _EXACT_VALUE_BYTES * shape.n_kv_heads * shape.head_dim


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    Attributes:
        n_tokens, n_coded: tokens held, and those of them that are coded.
        coded_bytes: of the coded tokens, side information and padding included.
        exact_bytes: of sinks, tail and an incomplete last group, at 2 bytes a value.
        basis_bytes: shared by all caches of the model, and in none of the other figures.
        bits_per_value: of the whole cache.
        coded_bits: of the coded part alone, which is what papers state; 16 where nothing is coded.
        key_bits, value_bits: the coded part's, by layer.
    """

    n_tokens: int
    n_coded: int
    coded_bytes: int
    exact_bytes: int
    basis_bytes: int
    bits_per_value: float
    coded_bits: float
    key_bits: tuple[float, ...]
    value_bits: tuple[float, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the cache, without the basis."""
        return self.coded_bytes + self.exact_bytes


def cache_size(method: Method, shape: ModelShape, n_tokens: int, *, n_sinks: int, tail: int) -> CacheSize:
    """The size of one sequence's cache after ``n_tokens`` tokens: sinks and tail exact, the rest in whole groups."""
    n_coded = method.coded_end(n_sinks, n_tokens - tail) - n_sinks
    values_a_layer = shape.n_kv_heads * shape.head_dim

    def by_layer(side: Side) -> list[int]:
        return [method.coded_bytes(layer, side, n_coded) if n_coded else 0 for layer in range(shape.n_layers)]

    def bits(n_bytes: int, n_values: int) -> float:
        return 8 * n_bytes / n_values if n_values else 8.0 * _EXACT_VALUE_BYTES

    keys, values = by_layer("key"), by_layer("value")
    coded_bytes = sum(keys) + sum(values)
    exact_bytes = 2 * shape.n_layers * (n_tokens - n_coded) * exact_token_bytes(shape)
    n_streams = 2 * shape.n_layers * values_a_layer
    return CacheSize(
        n_tokens=n_tokens,
        n_coded=n_coded,
        coded_bytes=coded_bytes,
        exact_bytes=exact_bytes,
        basis_bytes=method.basis_bytes(),
        bits_per_value=bits(coded_bytes + exact_bytes, n_streams * n_tokens),
        coded_bits=bits(coded_bytes, n_streams * n_coded),
        key_bits=tuple(bits(layer, values_a_layer * n_coded) for layer in keys),
        value_bits=tuple(bits(layer, values_a_layer * n_coded) for layer in values),
    )
