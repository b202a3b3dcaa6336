"""`PrefixStore`: what was read once need not be computed again, in this process or another one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._native import NativePrefixStore, PrefixScope
from ..cache import CompressedDynamicCache
from ..cache.container import check_portable, check_range, whole_numbers
from ..counts import is_count
from ..errors import (
    BlockError,
    ContainerError,
    KvlatheError,
    ModelError,
    PrefixStoreError,
    PrefixStoreWarning,
    PresetError,
    ShapeError,
)
from ..given_model import input_device, transformers_model
from ..model_identity import model_identity
from ..preset import Preset
from .cutting import CutCache
from .generation import generate
from .joining import Chunk, FoundRow, fill
from .statistics import PrefixStatistics

# Chunks that are encoded and on their way at once: memory is bounded, and the way is used.
_N_AT_ONCE = 16


class PrefixStore:
    """Chunks of compressed caches under a URL, found again by the tokens they hold. Many processes may use one at once.

    A prefix belongs to its preset, to the model's weights with their dtype and active adapters, and to what else its
    keys depend on (``extra_key``): other caches are never found. Tokens are compared one by one.

    A store that is slow or down does not stop anybody: nothing is found, nothing is saved, and a `PrefixStoreWarning`
    says so once.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix``, ``gs://``, ``az://``, ``redis://host``, ``memory://``.
            Credentials come from the environment, as those services' own tools read them.
        preset: packs the blocks, or a file of one.
        model: whose caches these are; each call may name another one.
        chunk_len: tokens that are stored and found together, a whole number of the preset's blocks.
        tenant_secret: who does not have it finds nothing of what was saved with it, and cannot guess at it.
        uncompressed_tail: so many of a prompt's last tokens are left to the model, which makes them anew, and stay
            exact, as presets are measured: what is coded right before the next token costs most.
        compress_start_len: of the caches that `load` makes, as their ``uncompressed_tail``; see
            `CompressedDynamicCache`.
        timeout_s: seconds for a lookup, and for each other answer of the store.
        max_bytes: that a folder or bucket may hold after a `save` or `evict`; what was used longest ago goes first.
        max_age_s: seconds after which what nobody used goes; Redis sees to that itself.
        strict: raise what would be a warning.

    Raises:
        PrefixStoreError: a URL that names no store, a folder that cannot be made.
        PresetError: a file that is no preset, or one without codecs for keys and values.
        ShapeError: a ``chunk_len`` that is no whole number of blocks.
    """

    def __init__(
        self,
        url: str,
        preset: Preset | str | os.PathLike[str],
        *,
        model: PreTrainedModel | None = None,
        chunk_len: int = 256,
        tenant_secret: str | bytes = b"",
        compress_start_len: int = 0,
        uncompressed_tail: int = 128,
        timeout_s: float = 5.0,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        strict: bool = False,
    ) -> None:
        self.preset = preset if isinstance(preset, Preset) else Preset.load(preset)
        if not self.preset.digest:
            raise PresetError(
                f"{self.preset!r} has no codecs for keys and values (a seed-style file), so its caches are not stored; "
                f"calibrate one with `kvlathe tune`"
            )
        if not is_count(chunk_len) or not chunk_len or chunk_len % self.preset.block_len:
            raise ShapeError(
                f"chunk_len is {chunk_len!r}, expected a multiple of the preset's blocks of {self.preset.block_len} "
                f"tokens"
            )
        self.model = model
        self.chunk_len = chunk_len
        self.strict = strict
        self.statistics = PrefixStatistics()
        self._secret = tenant_secret.encode() if isinstance(tenant_secret, str) else bytes(tenant_secret)
        self._of_caches = {"compress_start_len": compress_start_len, "uncompressed_tail": uncompressed_tail}
        self._has_limits = max_bytes is not None or max_age_s is not None
        self._told: set[str] = set()
        self._native = NativePrefixStore(url, timeout_s, max_bytes, max_age_s)

    @property
    def url(self) -> str:
        """Without credentials."""
        return self._native.url

    def load(
        self,
        token_ids: Tensor | Sequence[Any],
        *,
        model: PreTrainedModel | None = None,
        extra_key: str | bytes = b"",
    ) -> tuple[CompressedDynamicCache, int]:
        """A cache with the longest stored prefix of a prompt, for ``generate(token_ids, past_key_values=cache)``.

        The last ``uncompressed_tail`` tokens of the prompt are left to the model, one at least, as it has to say what
        comes next. In a folder blocks are attended to where they lie, and processes share their memory.

        Args:
            token_ids: [T], or [B, T] without padding; the prefix is then the longest that all rows have.
            model: that will go on; by default the store's.
            extra_key: what keys and values depend on beside the tokens, such as a hash of an image.

        Returns:
            The cache, and how many tokens it holds; an empty one and 0 if there is nothing.

        Raises:
            ModelError: no model, or one whose layers hold something else than keys and values.
            PresetError: a model of another preset.
            ShapeError: ids of another shape.
            PrefixStoreError: if ``strict``, what would be a warning.
        """
        model = self._whose(model)
        rows = _rows(token_ids)
        cache = self._new_cache(model)
        weights = model_identity(model)
        scope = self._scope(weights, extra_key)
        windows = [layer.policy.window for layer in cache.layers]
        longest = max((window for window in windows if window is not None), default=None)
        try:
            found, n_chunks = self._find(scope, rows, None in windows, longest)
            if n_chunks:
                fill(cache.layers, found, self.preset, input_device(model))
        except (PrefixStoreError, ContainerError, BlockError, ShapeError) as error:
            self._tell(error)
            cache, n_chunks = self._new_cache(model), 0
        n_tokens = n_chunks * self.chunk_len
        cache.note_weights(weights)
        self.statistics.n_lookups += len(rows)
        self.statistics.n_hits += len(rows) if n_tokens else 0
        self.statistics.n_tokens_asked += sum(map(len, rows))
        self.statistics.n_tokens_found += n_tokens * len(rows)
        return cache, n_tokens

    def save(
        self,
        token_ids: Tensor | Sequence[Any],
        cache: CompressedDynamicCache,
        *,
        model: PreTrainedModel | None = None,
        extra_key: str | bytes = b"",
    ) -> int:
        """Store a cache's whole chunks, those that are not there yet. The cache stays as it is.

        Layers with sliding windows have dropped the beginning of a long prompt; `CompressedDynamicCache`'s
        `activate_past_recording()` before the prompt keeps it, as `generate` of this class does.

        Args:
            token_ids: [T] or [B, T]: the ids of the cache's tokens, or of the first of them; more, as `generate`
                returns, are left out.
            model: that computed the cache; by default the cache's own, or the store's.
            extra_key: as for `load`.

        Returns:
            Tokens of each row, from the first on, that are stored now; 0 if the store fails, or windows lack some.

        Raises:
            ModelError, PresetError, CacheStateError: a cache that cannot be stored, or whose model nobody knows.
            ShapeError: ids that do not fit the cache, or rows with padding in front.
            PrefixStoreError: if ``strict``, what would be a warning.
        """
        model = self._whose(model if model is not None else cache.model)
        rows = _rows(token_ids)
        weights = model_identity(model)
        with cache.held_still("PrefixStore.save()"):
            cut = CutCache(cache.layers, self.chunk_len)
        if cut.preset.digest != self.preset.digest:
            raise PresetError(
                f"the cache is packed with {cut.preset!r}, the store keeps those of {self.preset!r}; use one preset"
            )
        if len(rows) != cut.batch:
            raise ShapeError(
                f"token_ids have {len(rows)} rows, the cache {cut.batch}; give those of the cache"
            )
        scope = self._scope(weights, extra_key)
        n_chunks = min(cut.n_tokens, *map(len, rows)) // self.chunk_len
        try:
            for row, ids in enumerate(rows):
                self._put(scope, cut, row, ids[: n_chunks * self.chunk_len], weights)
            if self._has_limits:
                self._native.evict()
        except PrefixStoreError as error:
            self._tell(error)
            return 0
        if not cut.can_end(n_chunks):
            self._tell(
                PrefixStoreError(
                    "layers with sliding windows have dropped what a prefix needs of them: call "
                    "cache.activate_past_recording() before the prompt, or generate by PrefixStore.generate()"
                )
            )
            return 0
        return n_chunks * self.chunk_len

    def generate(
        self, model: PreTrainedModel | None = None, *, extra_key: str | bytes = b"", **inputs: Any
    ) -> Any:
        """`model.generate(**inputs)` with a cache of this store: looks its longest prefix up, generates, and saves what
        is new. For chats and agents, which send the whole conversation each time.

        Args:
            model: by default the store's.
            extra_key: as for `load`; needed where ``inputs`` hold tensors that the tokens do not determine, such as
                images.
            inputs: as for `generate`; ``input_ids`` [B, T] without padding among them.

        Raises:
            As `load` and `save`; ShapeError: padding, or tensors without an ``extra_key``.
        """
        return generate(self, self._whose(model), extra_key, inputs)

    def evict(self) -> tuple[int, int]:
        """Remove what ``max_bytes`` and ``max_age_s`` do not allow.

        Returns:
            Objects removed, and their bytes.

        Raises:
            PrefixStoreError: the store fails.
        """
        return self._native.evict()

    def __repr__(self) -> str:
        return f"PrefixStore({self.url!r}, {self.preset!r}, chunk_len={self.chunk_len})"

    def _whose(self, given: nn.Module | None) -> PreTrainedModel:
        model = given if given is not None else self.model
        if model is None:
            raise ModelError(
                "whose keys and values are these? Two fine-tunes of one model must not share them: pass model= here, "
                "or once to PrefixStore"
            )
        return transformers_model(model)

    def _new_cache(self, model: PreTrainedModel) -> CompressedDynamicCache:
        device = input_device(model)
        cache = CompressedDynamicCache.from_preset(self.preset, model=model, device=device, **self._of_caches)
        check_portable(cache.layers)
        return cache

    def _scope(self, weights: str, extra_key: str | bytes) -> PrefixScope:
        extra = extra_key.encode() if isinstance(extra_key, str) else bytes(extra_key)
        digest = self.preset.digest
        assert digest is not None
        return PrefixScope(digest, weights, extra, self.chunk_len, self._secret)

    def _find(
        self, scope: PrefixScope, rows: list[list[int]], full: bool, window: int | None
    ) -> tuple[list[FoundRow], int]:
        """What all rows have, and of how many chunks."""
        n_left = max(1, self._of_caches["uncompressed_tail"])
        n_chunks = max(0, min(map(len, rows)) - n_left) // self.chunk_len
        while n_chunks:
            found, counts = [], []
            for ids in rows:
                n_found, of_full, of_window, trouble = self._native.find(
                    scope, ids[: n_chunks * self.chunk_len], full, window
                )
                if trouble is not None:
                    self._tell(trouble)
                found.append(FoundRow(list(map(Chunk.of, of_full)), list(map(Chunk.of, of_window))))
                counts.append(n_found)
            n_chunks = min(counts)
            if window is None:
                return [FoundRow(row.full[:n_chunks], []) for row in found], n_chunks
            # Where another row ends, this one's windows may be missing.
            if n_chunks == max(counts):
                return found, n_chunks
        return [], 0

    def _put(self, scope: PrefixScope, cut: CutCache, row: int, ids: list[int], weights: str) -> None:
        keys = scope.keys(ids)
        parts = list(cut.parts(len(keys)))
        missing = self._native.missing(scope, ids, parts)
        new = [part for part, is_missing in zip(parts, missing, strict=True) if is_missing]
        for at in range(0, len(new), _N_AT_ONCE):
            files = [cut.file(row, part, keys[part[0]], weights) for part in new[at : at + _N_AT_ONCE]]
            self.statistics.n_bytes_saved += self._native.put(scope, ids, files)
            self.statistics.n_chunks_saved += len(files)
        self._native.touch(scope, ids, parts)

    def _tell(self, error: KvlatheError) -> None:
        """What went wrong, once; or always, if strict."""
        self.statistics.n_failures += 1
        if self.strict:
            raise error
        kind = type(error).__name__ + str(error)[:40]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{error}; going on without it", PrefixStoreWarning, stacklevel=3)


def _rows(token_ids: Tensor | Sequence[Any]) -> list[list[int]]:
    """Each row's ids.

    Raises:
        ShapeError: something else than whole numbers [T] or [B, T].
    """
    ids = whole_numbers(token_ids)
    if ids is None or not ids.numel():
        given = torch.as_tensor(token_ids)
        raise ShapeError(
            f"token_ids are {given.dtype} {list(given.shape)}, expected whole numbers [T] or [B, T]"
        )
    check_range(ids)
    rows: list[list[int]] = ids.tolist()
    return rows
