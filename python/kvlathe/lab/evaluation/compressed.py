"""Our own caches as methods to evaluate, at the rate of their preset."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from ..._native import LowRankCodec, StreamSetCodec
from ...cache import CompressedDynamicCache
from ...calibration.quality.coders import blocks_end, read_back
from ...calibration.rope_probe import ModelShape
from ...compressors import IdentityCompressor, StreamSetCompressor, granularity
from ...errors import EvaluationError
from ...preset import Preset, Side
from .size import SIDES, exact_token_bytes


class PresetMethod:
    """A preset's codecs.

    Args:
        preset: at the rate to be measured.
        shape: of the model's cache.
        label: tells presets apart, such as the file's name; empty where there is only one.

    Raises:
        EvaluationError: a calibration without a rate, or a preset for a cache of another shape.
    """

    def __init__(self, preset: Preset, shape: ModelShape, label: str = "") -> None:
        if preset.bits_per_value <= 0:
            raise EvaluationError(
                f"the preset {label or preset.meta['model']} holds a calibration, but no rate; give one or more, "
                f"such as --bits 2.25 3.25"
            )
        given = (preset.n_layers, int(preset.meta["head_dim"]))
        if given != (shape.n_layers, shape.head_dim):
            raise EvaluationError(
                f"the preset {label or preset.meta['model']} is for {given[0]} layers and head_dim {given[1]}, the "
                f"model has {shape.n_layers} layers and head_dim {shape.head_dim}; give a preset of this model"
            )
        of = f", {label}" if label else ""
        kind = "seed preset" if preset.is_seed_style else "kvlathe"
        self.name = f"{kind} {preset.bits_per_value:.2f} bits{of}"
        self.family = f"{kind}{of}"
        self.identity = "preset " + hashlib.sha256(preset.native.to_safetensors()).hexdigest()
        self._shape = shape
        self._cache = CompressedDynamicCache.from_preset(preset)
        streams = [(layer, side) for layer in range(preset.n_layers) for side in SIDES]
        self._codecs = {(layer, side): preset.codec(layer, side) for layer, side in streams}
        self.group_len = max(granularity(self._cache.compressor(layer, side)) for layer, side in streams)

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        compressor = self._cache.compressor(layer, side)
        return x if type(compressor) is IdentityCompressor else read_back(compressor, x, position)

    def coded_end(self, start: int, end: int) -> int:
        return blocks_end(self.group_len, start, end)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        codec = self._codecs[layer, side]
        if isinstance(codec, StreamSetCodec):
            return -(-n_tokens // codec.block_len) * self._block_bytes[layer, side]
        if isinstance(codec, LowRankCodec):
            return n_tokens * self._shape.n_kv_heads * codec.vector_bytes
        return n_tokens * exact_token_bytes(self._shape)

    @cached_property
    def _block_bytes(self) -> dict[tuple[int, Side], int]:
        """What a real cache says that it holds for a block of each side: packed bytes, padding, reference counts."""
        found: dict[tuple[int, Side], int] = {}
        for stream in self._codecs:
            compressor = self._cache.compressor(*stream)
            if isinstance(compressor, StreamSetCompressor):
                n_tokens = compressor.n_sinks + compressor.block_len
                x = torch.zeros(1, self._shape.n_kv_heads, n_tokens, self._shape.head_dim)
                cache = CompressedDynamicCache([compressor], [IdentityCompressor()], num_layers=1)
                cache.update(x, x, 0)
                found[stream] = int(cache.get_memory_stats()["coded_bytes"])
        return found

    def basis_bytes(self) -> int:
        total = 0
        for (layer, side), codec in self._codecs.items():
            if isinstance(codec, StreamSetCodec):
                tables = [codec.tables(head) for head in range(codec.n_heads)]
                total += sum(len(table) for of_head in tables for table in of_head.values())
            elif codec is not None:
                total += sum(buffer.nbytes for buffer in self._cache.compressor(layer, side).buffers())
        return total
