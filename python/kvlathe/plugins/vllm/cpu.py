"""vLLM on CPUs: its tiers are made for GPUs, and its kernels keep keys in an order of their own."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from ...errors import ModelError


class CpuTieringSpec(TieringOffloadingSpec):
    """``TieringOffloadingSpec`` where the model runs on a CPU: ``"spec_name": "CpuTieringSpec", "spec_module_path":
    "kvlathe.plugins.vllm"``."""

    _copier: CopyingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._copier is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._copier = CopyingWorker(kv_caches, self.blocks_per_chunk, region)
        return self._copier


class CopyingWorker(OffloadingWorker):
    """Copies blocks to and from the region that the tiers read, at once."""

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._n_per_chunk, self._region = blocks_per_chunk, region
        self._finished: list[TransferResult] = []
        # Of each group: a layer's blocks, [blocks, bytes], and their places, [chunks, blocks of a chunk, bytes].
        tensors: list[tuple[Tensor, Tensor]] = []
        for held in kv_caches.tensors:
            n_bytes = held.page_size_bytes
            blocks = held.tensor.view(torch.int8).view(-1, n_bytes)
            places = region.create_next_worker_view(n_bytes * blocks_per_chunk)
            tensors.append((blocks, places.unflatten(1, (blocks_per_chunk, n_bytes))))
        self._groups = [
            [tensors[index] for index in sorted({ref.tensor_idx for ref in refs})]
            for refs in kv_caches.group_data_refs
        ]

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        started, n_bytes = time.perf_counter(), 0
        for blocks, places, at, (chunk, slot) in self._pairs(src_spec, dst_spec):
            places[chunk, slot] = blocks[at]
            n_bytes += at.numel() * blocks.shape[1]
        return self._done(job_id, n_bytes, started)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        started, n_bytes = time.perf_counter(), 0
        for blocks, places, at, (chunk, slot) in self._pairs(dst_spec, src_spec):
            blocks[at] = places[chunk, slot]
            n_bytes += at.numel() * blocks.shape[1]
        return self._done(job_id, n_bytes, started)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Everything is done when it is submitted."""

    def shutdown(self) -> None:
        self._groups.clear()
        self._region.cleanup()

    def _pairs(self, gpu: GPULoadStoreSpec, cpu: CPULoadStoreSpec):  # type: ignore[no-untyped-def]
        """Of each layer: its blocks, their places, which blocks, and the chunk and slot of each."""
        blocks_at = chunks_at = 0
        for layers, n_blocks, first in zip(self._groups, gpu.group_sizes, gpu.block_indices, strict=True):
            if not n_blocks:
                continue
            # The first block may lie in the middle of its chunk.
            slot = first % self._n_per_chunk + torch.arange(n_blocks)
            n_chunks = int(slot[-1]) // self._n_per_chunk + 1
            chunks = torch.as_tensor(cpu.chunk_ids[chunks_at : chunks_at + n_chunks], dtype=torch.int64)
            at = torch.as_tensor(gpu.block_ids[blocks_at : blocks_at + n_blocks], dtype=torch.int64)
            for blocks, places in layers:
                yield blocks, places, at, (chunks[slot // self._n_per_chunk], slot % self._n_per_chunk)
            blocks_at += n_blocks
            chunks_at += n_chunks

    def _done(self, job_id: int, n_bytes: int, started: float) -> bool:
        took = time.perf_counter() - started
        self._finished.append(TransferResult(job_id, True, transfer_size=n_bytes, transfer_time=took))
        return True


def kernel_slots(dtype: torch.dtype, block_tokens: int, head_dim: int) -> list[int]:
    """Where vLLM's kernel on this CPU puts a head's keys and values within a block: [2, block_tokens, head_dim] flat.
    Found by having it write numbers that say where they come from.

    Raises:
        ModelError: a kernel that does more than moving them, as those of 8-bit caches do.
    """
    isa = _get_attn_isa(dtype, block_tokens, head_dim, "auto")
    n = block_tokens * head_dim
    source = torch.arange(2 * n)
    found = torch.zeros(2 * n, dtype=torch.int64)
    # By digits that every dtype has exactly.
    for place in (1, 256, 256 * 256):
        digits = (source // place % 256).to(dtype).view(2, block_tokens, 1, head_dim)
        block = torch.full((1, 1, 2 * block_tokens, head_dim), -1, dtype=dtype)
        keys, values = block.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digits[0].contiguous(), digits[1].contiguous(), keys, values, torch.arange(block_tokens), isa
        )
        found += block.flatten().long() * place
    if not torch.equal(found.sort().values, source):
        raise ModelError(
            f"vLLM's {isa} kernel does not keep {dtype} keys and values of {head_dim} components as they are; use "
            f"another kv_cache_dtype"
        )
    return found.argsort().tolist()
