"""A preset's compressors, made once and shared by all of its caches."""

from __future__ import annotations

import torch
from torch import nn

from ._native import StreamSetCodec
from .compressors import IdentityCompressor, QuantizedCalibratedCompressor, StreamSetCompressor
from .errors import PresetError
from .preset import Preset, Side, loaded_preset
from .saved import maker


def preset_compressor(preset: Preset, layer: int, side: Side) -> nn.Module:
    known = preset._compressors
    if (layer, side) not in known:
        known[layer, side] = _new_compressor(preset, layer, side)
    compressor: nn.Module = known[layer, side]
    return compressor


@maker("stream set")
def _restored(digest: str, layer: int, side: Side, n_sinks: int) -> nn.Module:
    """A pickled compressor, by the name of its codec.

    Raises:
        PresetError: no preset of that digest is loaded.
    """
    preset = loaded_preset(digest)
    compressor = preset_compressor(preset, layer, side)
    if getattr(compressor, "n_sinks", None) != n_sinks:
        compressor = StreamSetCompressor(compressor.native, n_sinks)  # type: ignore[arg-type]
        compressor.preset = preset
    return compressor


def _new_compressor(preset: Preset, layer: int, side: Side) -> nn.Module:
    codec = preset.codec(layer, side)
    if codec is None:
        return IdentityCompressor()
    if isinstance(codec, StreamSetCodec):
        compressor = StreamSetCompressor(codec, preset.n_sinks)
        # Who has a cache has its preset, by which a pickled one is found again.
        compressor.preset = preset
        return compressor
    return shared_compressor(preset, layer, side)


def shared_compressor(preset: Preset, layer: int, side: Side, bits: int = 8) -> QuantizedCalibratedCompressor:
    """The seed's compressor from a preset's U and mean (every preset of ours carries them too).

    Raises:
        PresetError: a seed-style preset that leaves this side out.
    """
    shared = preset.native.shared(layer, side)
    if shared is None:
        raise PresetError(f"the preset has no U for the {side}s of layer {layer}")
    rank, u_bytes, mean_bytes = shared
    u = torch.frombuffer(bytearray(u_bytes), dtype=torch.float32).view(-1, rank)
    mean = torch.frombuffer(bytearray(mean_bytes), dtype=torch.float32)
    return QuantizedCalibratedCompressor(u, mean, bits=bits)
