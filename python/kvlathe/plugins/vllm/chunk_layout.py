"""How vLLM lays a chunk out: by its configuration, and on CPUs by what its kernel does."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingSpec

from ...errors import ModelError, PresetError
from ...preset import Preset
from ..page_layout import PageLayout
from ..page_store import page_sizes


def chunk_layout(spec: OffloadingSpec, preset: Preset) -> PageLayout:
    """How the chunks of a spec lie in memory, by its sizes and those of the preset.

    Raises:
        ModelError: a model or a way of splitting it that is not served.
        PresetError: a preset of another model.
    """
    config = spec.config
    parallel = config.parallel
    if len(config.groups) != 1:
        raise ModelError(
            f"{config.model.name} has {len(config.groups)} groups of layers (sliding windows, recurrent layers); "
            f"kvlathe's tier serves models whose layers are alike"
        )
    if parallel.pp_size * parallel.pcp_size * parallel.dcp_size != 1:
        raise ModelError("kvlathe's tier serves tensor parallelism, not pipeline or context parallelism")
    n_layers, n_heads, head_dim = page_sizes(preset)
    # A canonical chunk holds all heads once, whoever wrote them.
    n_workers = 1 if config.canonical_layout else parallel.tp_size
    if n_heads % n_workers:
        raise ModelError(
            f"{n_heads} KV heads on {n_workers} workers: heads that several workers hold are not served"
        )
    dtype = getattr(torch, str(config.model.dtype).removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(
            f"vLLM's cache holds {config.model.dtype}; kvlathe compresses float32, bfloat16 and float16: leave "
            f"kv_cache_dtype at auto"
        )
    block_tokens = config.groups[0].tokens_per_block
    slots = None
    if current_platform.is_cpu():
        from .cpu import kernel_slots

        slots = kernel_slots(dtype, block_tokens, head_dim)
    layout = PageLayout(
        axes=config.kv_cache_layout or "LBHNC",
        n_layers=len(config.groups[0].layer_names),
        n_workers=n_workers,
        n_heads=n_heads // n_workers,
        n_blocks=spec.blocks_per_chunk,
        block_tokens=block_tokens,
        head_dim=head_dim,
        dtype=dtype,
        slots=slots,
    )
    n_bytes = config.worker_kv_bytes_per_block * spec.blocks_per_chunk * parallel.tp_size
    if layout.n_bytes != n_bytes:
        raise PresetError(
            f"{preset!r} is for layers, KV heads and head_dim of {n_layers, n_heads, head_dim}, which take "
            f"{layout.n_bytes} bytes of {layout.n_tokens} tokens, and {config.model.name} takes {n_bytes}; use a "
            f"preset of this model"
        )
    return layout
