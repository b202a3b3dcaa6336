"""A server's pages, coded by a preset, under a URL. What names a page, and where it lies, the server says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .._native import EncodedPage, NativePageStore, NativePrefixStore, PrefixScope, StreamSetCodec
from ..errors import PresetError, ShapeError
from ..preset import Preset

# A page as its server names it: its key, and the position of its first token.
PageName = tuple[bytes, int]

# Share of the numbers' energy that coding may change. Presets of 1.5 bits change less than a tenth of it; numbers in
# another order than the preset's are changed by more than all of it.
_MOST_CHANGED = 0.5

# Seconds between looks at what the limits do not allow.
_EVICTION_INTERVAL_S = 30.0


class PageStore:
    """Pages of one model under a URL, for many processes at once. All methods may be called from several threads.

    Args:
        url: as for `PrefixStore`.
        preset: packs the blocks, or a file of one.
        server: name of the server, and what else the contents of its pages depend on; other servers' are not found.
        model: its name, for people.
        weights: identity of the model's weights.
        page_tokens: tokens of a page, a whole number of the preset's blocks.
        dtype: of its numbers.
        extra_key, tenant_secret, timeout_s, max_bytes, max_age_s: as for `PrefixStore`.
        n_threads: that code one page.

    Attributes:
        page_shape: keys and values of a page: [2, layers, KV heads, tokens, head_dim].

    Raises:
        PresetError: a preset that does not code every layer, or layers unlike each other.
        PrefixStoreError, ShapeError: as for `PrefixStore`.
    """

    def __init__(
        self,
        url: str,
        preset: Preset | str | os.PathLike[str],
        *,
        server: str,
        model: str,
        weights: str,
        page_tokens: int,
        dtype: torch.dtype,
        extra_key: str = "",
        tenant_secret: str = "",
        timeout_s: float = 5.0,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        n_threads: int = 1,
    ) -> None:
        self.preset = preset if isinstance(preset, Preset) else Preset.load(preset)
        n_layers, n_heads, head_dim = _uniform(self.preset)
        block_len = self.preset.block_len
        if page_tokens <= 0 or page_tokens % block_len:
            raise ShapeError(
                f"pages of {page_tokens} tokens, expected a multiple of the preset's blocks of {block_len} tokens; set "
                f"the server's chunks to such a number"
            )
        self.page_shape = (2, n_layers, n_heads, page_tokens, head_dim)
        self.dtype = dtype
        self._n_threads = n_threads
        self._has_limits = max_bytes is not None or max_age_s is not None
        self._evict_at = time.monotonic() + _EVICTION_INTERVAL_S
        self._store = NativePrefixStore(url, timeout_s, max_bytes, max_age_s)
        assert self.preset.digest is not None
        extra = json.dumps({"server": server, "dtype": str(dtype), "extra_key": extra_key}).encode()
        scope = PrefixScope(self.preset.digest, weights, extra, page_tokens, tenant_secret.encode())
        codecs = [_codecs(self.preset, layer) for layer in range(n_layers)]
        self._pages = NativePageStore(self._store, scope, codecs, self.preset.n_sinks, model, weights)

    @property
    def url(self) -> str:
        """Without credentials."""
        return self._store.url

    def missing(self, pages: Sequence[PageName]) -> list[bool]:
        """Which pages are not there.

        Raises:
            PrefixStoreError: the store fails or is slow.
        """
        return self._pages.missing(list(pages))

    def encode(self, page: PageName, numbers: Tensor) -> EncodedPage:
        """Code a page.

        Args:
            page: its name.
            numbers: of the shape `page_shape`, contiguous, keys rotated at their positions.

        Raises:
            NonFiniteError: numbers that are not finite.
            ShapeError: another shape, a position inside of a block.
        """
        key, first_position = page
        return self._pages.encode(key, first_position, self._sides(numbers), self._n_threads)

    def check_order(self, page: PageName, numbers: Tensor) -> None:
        """Refuse numbers that the preset cannot be meant for: in another order than it takes them, or of another model.

        Raises:
            PresetError: coding changes them by half or more.
        """
        again = torch.empty_like(numbers)
        self._pages.decode(self.encode(page, numbers), self._sides(again), self._n_threads)
        exact = numbers.float()
        changed = float(((again.float() - exact) ** 2).sum() / (exact**2).sum())
        if not changed < _MOST_CHANGED:
            raise PresetError(
                f"the preset {self.preset!r} does not fit this model's keys and values: coding changes {changed:.0%} of "
                f"their energy; calibrate one for this model with `kvlathe tune`"
            )

    def put(self, pages: Sequence[EncodedPage]) -> int:
        """Keep coded pages; what the limits do not allow goes, now and then.

        Returns:
            Bytes written.

        Raises:
            PrefixStoreError: the store fails or is slow.
        """
        self._pages.put(list(pages))
        if self._has_limits and time.monotonic() >= self._evict_at:
            self._evict_at = time.monotonic() + _EVICTION_INTERVAL_S
            self._store.evict()
        return sum(page.n_bytes for page in pages)

    def load(self, page: PageName, numbers: Tensor) -> int | None:
        """Expand a page into ``numbers``, of the shape `page_shape`.

        Returns:
            Bytes read; None if it is not there.

        Raises:
            PrefixStoreError: the store fails or is slow, or what lies there is damaged; it is removed then.
        """
        key, first_position = page
        return self._pages.load(key, first_position, self._sides(numbers), self._n_threads)

    def touch(self, pages: Sequence[PageName]) -> None:
        """Note that pages were used, where eviction goes by that.

        Raises:
            PrefixStoreError: the store fails or is slow.
        """
        self._pages.touch(list(pages))

    def __repr__(self) -> str:
        return f"PageStore({self.url!r}, {self.preset!r}, pages of {self.page_shape[3]} tokens)"

    def _sides(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(numbers.shape) != self.page_shape or numbers.dtype != self.dtype:
            raise ShapeError(
                f"a page is {numbers.dtype} {list(numbers.shape)}, expected {self.dtype} {list(self.page_shape)}"
            )
        return numbers[0], numbers[1]


def _uniform(preset: Preset) -> tuple[int, int, int]:
    """Layers, KV heads and head_dim.

    Raises:
        PresetError: layers that have none, or others than the first.
    """
    shapes = set(preset.layer_shapes)
    if not preset.digest or None in shapes or len(shapes) != 1:
        raise PresetError(
            f"{preset!r} has layers that are not coded, or of different sizes; a server's pages need all layers alike"
        )
    n_heads, key_dim, value_dim = cast(tuple[int, int, int], shapes.pop())
    if key_dim != value_dim:
        raise PresetError(f"{preset!r} has keys of {key_dim} components and values of {value_dim}, expected equal ones")
    return preset.n_layers, n_heads, key_dim


def _codecs(preset: Preset, layer: int) -> tuple[StreamSetCodec, StreamSetCodec]:
    key, value = preset.codec(layer, "key"), preset.codec(layer, "value")
    if not isinstance(key, StreamSetCodec) or not isinstance(value, StreamSetCodec):
        raise PresetError(f"layer {layer} of {preset!r} has no codecs for both keys and values")
    return key, value


