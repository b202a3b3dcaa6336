"""The tier: vLLM's chunks, compressed, in a folder, an object store or Redis."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ...errors import KvlatheError, ModelError
from ...preset import Preset
from ..page_store import PageName, PageStore
from ..weights import weights_identity
from .chunk_layout import chunk_layout

_LOG = logging.getLogger(__name__)

# A chunk and its row in the primary tier's memory.
_Chunk = tuple[PageName, int]


class CompressedTier(SecondaryTierManager):
    """A secondary tier for ``TieringOffloadingSpec``: ``{"type": "CompressedTier", "module_path":
    "kvlathe.plugins.vllm", "url": …, "preset": …}``.

    Chunks belong to the preset, to the model's weights and dtype, to the sizes of chunks, to ``extra_key`` and to
    ``tenant_secret``. vLLM's own keys name their tokens: hashes over all tokens of a request up to there, its images,
    LoRA name and ``cache_salt``. A store that is slow or down is a miss, and told once.

    Args:
        offloading_spec, primary_kv_view, tier_type, backpressure_detector: what vLLM gives.
        url: ``file:///folder``, ``s3://bucket/prefix``, ``gs://``, ``az://``, ``redis://host``.
        preset: a preset of the model, a file.
        weights: an identity of the model's weights; by default made from its files.
        extra_key: what else keys and values depend on, such as weights of LoRAs.
        tenant_secret: who does not have it finds nothing of what was saved with it.
        uncompressed_tail: so many of a prompt's last tokens at least are left to the model and stay exact, as presets
            are measured; what else ends within a chunk is too.
        timeout_s, max_bytes, max_age_s: as for `kvlathe.PrefixStore`.
        n_threads: that code chunks, and as many that expand them.

    Raises:
        ModelError: a model, a layout of its cache or a way of splitting it that is not served.
        PresetError, ShapeError: a preset of another model, chunks that are no whole number of its blocks.
        PrefixStoreError: a URL that names no store, a folder that cannot be made.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        url: str,
        preset: str,
        weights: str | None = None,
        extra_key: str = "",
        tenant_secret: str = "",
        uncompressed_tail: int = 128,
        timeout_s: float = 5.0,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        n_threads: int = 2,
        backpressure_detector: BackpressureDetector | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        of_model = offloading_spec.config.model
        calibrated = Preset.load(preset)
        self._store = PageStore(
            url,
            calibrated,
            chunk_layout(offloading_spec, calibrated),
            server="vLLM",
            model=of_model.name,
            weights=weights or weights_identity(of_model.name),
            extra_key=extra_key,
            tenant_secret=tenant_secret,
            timeout_s=timeout_s,
            max_bytes=max_bytes,
            max_age_s=max_age_s,
            n_threads=n_threads,
        )
        self._uncompressed_tail = uncompressed_tail
        self._chunks = torch.from_numpy(np.asarray(primary_kv_view)).view(torch.uint8)
        self._told: set[str] = set()
        # Loads do not wait for stores.
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="kvlathe-vllm-store")
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="kvlathe-vllm-load")
        self._going: set[Future[None]] = set()
        self._finished: SimpleQueue[tuple[JobResult, list[OffloadKey]]] = SimpleQueue()
        self._lookups = _Lookups(self, tier_type)
        _LOG.info("%r: %s", self._store, self._store.layout)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if self._is_in_tail(key, req_context):
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._storing, self._store_chunks, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._loading, self._load_chunks, job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        while not self._finished.empty():
            result, failed = self._finished.get()
            # A chunk that could not be read is computed, not asked for again and again.
            self._lookups.mark_miss(failed)
            results.append(result)
        return results

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        pages = [self._page(key, req_context) for key in keys]
        self._go(self._loading, self._touch, [page for page in pages if page is not None])

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def drain_jobs(self) -> None:
        wait(set(self._going))

    def shutdown(self) -> None:
        self._lookups.shutdown()
        self._storing.shutdown(wait=True)
        self._loading.shutdown(wait=True)
        # The memory is vLLM's, which gives it back now.
        self._chunks = self._chunks.new_empty(0)

    def are_there(self, keys: list[OffloadKey], req_context: ReqContext) -> list[bool]:
        """Which chunks can be loaded. Called on the thread of lookups."""
        pages = [self._page(key, req_context) for key in keys]
        asked = [page for page in pages if page is not None]
        try:
            missing = self._store.missing(asked)
        except KvlatheError as error:
            self._tell(error)
            return [False] * len(keys)
        kept = {page for page, is_missing in zip(asked, missing, strict=True) if not is_missing}
        return [page in kept for page in pages]

    def _page(self, key: OffloadKey, req_context: ReqContext) -> PageName | None:
        """A chunk as the store names it; None if vLLM does not say where it is, or it is no whole one."""
        end = req_context.get_offload_key_position(key)
        n_tokens = self._store.layout.n_tokens
        if end is None or end % n_tokens:
            return None
        return bytes(key), end - n_tokens

    def _is_in_tail(self, key: OffloadKey, req_context: ReqContext) -> bool:
        """Whether a chunk holds some of the tokens that the model is to make anew."""
        end = req_context.get_offload_key_position(key)
        # vLLM notes the positions of a request's chunks in their order.
        last = next(reversed(req_context._offload_key_positions.values()), 0)
        return end is not None and end > last - self._uncompressed_tail

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        work: Callable[[list[_Chunk]], tuple[int, int]],
        job: TransferJob,
    ) -> None:
        keys = list(job.keys)
        # Looked up here, as the request belongs to this thread.
        pages = [self._page(key, job.req_context) for key in keys]
        chunks = [
            (page, int(chunk)) for page, chunk in zip(pages, job.chunk_ids, strict=True) if page is not None
        ]

        def run() -> None:
            started, n_done, n_bytes = time.perf_counter(), 0, 0
            try:
                if len(chunks) < len(keys):
                    raise ModelError(
                        "vLLM does not say where in its request a chunk begins, or it is no whole one"
                    )
                n_done, n_bytes = work(chunks)
            except Exception as error:  # whatever it is, vLLM waits for the job's result
                self._tell(error)
            done = n_done == len(keys)
            took = time.perf_counter() - started
            result = JobResult(
                job.job_id,
                success=done,
                successful_keys=tuple(keys[:n_done]) if job.is_promotion and n_done and not done else None,
                transfer_time=took,
                transfer_bytes=n_bytes,
            )
            self._finished.put((result, keys[n_done:] if job.is_promotion else []))

        self._go(pool, run)

    def _go(self, pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: Any) -> None:
        future = pool.submit(work, *arguments)
        self._going.add(future)
        future.add_done_callback(self._going.discard)

    def _store_chunks(self, chunks: list[_Chunk]) -> tuple[int, int]:
        """How many chunks are stored now, all or none, and bytes that were written."""
        missing = self._store.missing([page for page, _ in chunks])
        new = [chunk for chunk, is_missing in zip(chunks, missing, strict=True) if is_missing]
        pages, rows = [page for page, _ in new], [row for _, row in new]
        n_bytes = self._store.save(pages, self._chunks, rows)
        if 0 in n_bytes:
            self._tell(
                f"chunks that {self._store.preset!r} would change by more than {self._store.most_changed:.0%} of their "
                f"energy are not stored; if that is so for all, calibrate a preset for this model with `kvlathe tune`"
            )
        n_done = len(chunks) if 0 not in n_bytes else 0
        return n_done, sum(n_bytes)

    def _load_chunks(self, chunks: list[_Chunk]) -> tuple[int, int]:
        """How many chunks, from the first on, are in their places now, and bytes that were read."""
        pages, rows = [page for page, _ in chunks], [row for _, row in chunks]
        n_done = n_bytes = 0
        for n_read, error in self._store.load(pages, self._chunks, rows):
            if error is not None:
                self._tell(error)
            if n_read is None:
                break
            n_done, n_bytes = n_done + 1, n_bytes + n_read
        return n_done, n_bytes

    def _touch(self, pages: list[PageName]) -> None:
        try:
            self._store.touch(pages)
        except KvlatheError as error:
            self._tell(error)

    def _tell(self, what: object) -> None:
        """What went wrong, each kind of it once."""
        kind = str(what)[:50]
        if kind not in self._told:
            self._told.add(kind)
            _LOG.warning("kvlathe: %s; vLLM goes on without it", what)


class _Lookups(AsyncLookupManager):
    """Asks the store on a thread of its own."""

    def __init__(self, tier: CompressedTier, tier_type: str) -> None:
        self._tier = tier
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._tier.are_there(keys, req_context)
