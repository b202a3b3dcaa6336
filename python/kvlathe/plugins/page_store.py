"""A server's pages, coded by a preset, under a URL. What names a page, and where it lies, the server says."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from .._native import NativePageStore, NativePrefixStore, PrefixScope, StreamSetCodec
from ..errors import KvlatheError, PresetError, ShapeError
from ..preset import Preset
from .page_layout import PageLayout

# A page as its server names it: its key, and the position of its first token.
PageName = tuple[bytes, int]

# Share of the numbers' energy that coding at 0 bits may change, and half of it for each 2 bits more. SmolLM2's presets
# of 1.1 to 2.5 bits change a third of that; numbers in another order, or at other positions, are changed by twice
# that or more.
_MOST_CHANGED = 0.5

# Seconds between looks at what the limits do not allow.
_EVICTION_INTERVAL_S = 30.0


class PageStore:
    """Pages of one model under a URL, for many processes at once. All methods may be called from several threads.

    Args:
        url: as for `PrefixStore`.
        preset: packs the blocks.
        layout: where the numbers of a page lie.
        server: name of the server, and what else the contents of its pages depend on; other servers' are not found.
        model: its name, for people.
        weights: identity of the model's weights.
        extra_key, tenant_secret, timeout_s, max_bytes, max_age_s: as for `PrefixStore`.
        n_threads: that code or expand pages of one call.

    Raises:
        PresetError: a preset that does not code every layer, or of layers unlike the layout's.
        ShapeError: pages that are no whole number of blocks.
        PrefixStoreError: a URL that names no store, a folder that cannot be made.
    """

    def __init__(
        self,
        url: str,
        preset: Preset,
        layout: PageLayout,
        *,
        server: str,
        model: str,
        weights: str,
        extra_key: str = "",
        tenant_secret: str = "",
        timeout_s: float = 5.0,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        n_threads: int = 2,
    ) -> None:
        expected = (layout.n_layers, layout.n_workers * layout.n_heads, layout.head_dim)
        if page_sizes(preset) != expected:
            raise PresetError(
                f"{preset!r} is for layers, KV heads and head_dim of {page_sizes(preset)}, {model} has {expected}; use "
                f"a preset of this model"
            )
        block_len, page_tokens = preset.block_len, layout.n_tokens
        if page_tokens % block_len:
            raise ShapeError(
                f"pages of {page_tokens} tokens, expected a multiple of the preset's blocks of {block_len} tokens; let "
                f"the server move so many together"
            )
        self.preset, self.layout = preset, layout
        self._n_threads = n_threads
        self._has_limits = max_bytes is not None or max_age_s is not None
        self._evict_at = time.monotonic() + _EVICTION_INTERVAL_S
        self._store = NativePrefixStore(url, timeout_s, max_bytes, max_age_s)
        assert preset.digest is not None
        extra = json.dumps({"server": server, "dtype": str(layout.dtype), "extra_key": extra_key}).encode()
        self._pages = NativePageStore(
            self._store,
            PrefixScope(preset.digest, weights, extra, page_tokens, tenant_secret.encode()),
            [_codecs(preset, layer) for layer in range(layout.n_layers)],
            preset.n_sinks,
            layout.sizes,
            layout.strides,
            layout.places,
            str(layout.dtype),
            model,
            weights,
        )

    @property
    def most_changed(self) -> float:
        """The largest share of a page's energy that coding may change."""
        return _MOST_CHANGED * 2 ** (-self.preset.bits_per_value / 2)

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

    def save(self, pages: Sequence[PageName], memory: Tensor, rows: Sequence[int]) -> list[int]:
        """Code pages and keep them; what the limits do not allow goes, now and then.

        A page that coding changes more than a preset of this rate should change it is not kept: its numbers lie in
        another order than the layout says, at other positions, or are another model's; or the text is like no text.

        Args:
            pages: their names.
            memory: the server's, uint8 [rows, bytes]; a page lies at the beginning of a row.
            rows: of the pages, all different.

        Returns:
            Of each page: bytes written, 0 if it was not kept.

        Raises:
            NonFiniteError: numbers that are not finite.
            ShapeError: positions inside of a block.
            PrefixStoreError: the store fails or is slow; what was kept before stays.
        """
        saved = self._pages.save(list(pages), memory, list(rows), self.most_changed, self._n_threads)
        if self._has_limits and time.monotonic() >= self._evict_at:
            self._evict_at = time.monotonic() + _EVICTION_INTERVAL_S
            self._store.evict()
        return [n_bytes for n_bytes, _ in saved]

    def load(
        self, pages: Sequence[PageName], memory: Tensor, rows: Sequence[int]
    ) -> list[tuple[int | None, KvlatheError | None]]:
        """Expand pages into the server's memory.

        Args:
            pages, memory, rows: as for `save`.

        Returns:
            Of each page: bytes read, None if it is not there; and what went wrong, if something did. A damaged page is
            removed from the store.
        """
        return self._pages.load(list(pages), memory, list(rows), self._n_threads)

    def touch(self, pages: Sequence[PageName]) -> None:
        """Note that pages were used, where eviction goes by that.

        Raises:
            PrefixStoreError: the store fails or is slow.
        """
        self._pages.touch(list(pages))

    def __repr__(self) -> str:
        return f"PageStore({self.url!r}, {self.preset!r}, pages of {self.layout.n_tokens} tokens)"


def page_sizes(preset: Preset) -> tuple[int, int, int]:
    """Layers, KV heads and head_dim of what a preset codes.

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
        raise PresetError(
            f"{preset!r} has keys of {key_dim} components and values of {value_dim}, expected equal ones"
        )
    return preset.n_layers, n_heads, key_dim


def _codecs(preset: Preset, layer: int) -> tuple[StreamSetCodec, StreamSetCodec]:
    key, value = preset.codec(layer, "key"), preset.codec(layer, "value")
    if not isinstance(key, StreamSetCodec) or not isinstance(value, StreamSetCodec):
        raise PresetError(f"layer {layer} of {preset!r} has no codecs for both keys and values")
    return key, value
