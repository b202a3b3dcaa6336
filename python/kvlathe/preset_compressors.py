"""A preset's compressors, made once and shared by all of its caches."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from ._native import StreamSetCodec
from .compressors import IdentityCompressor, QuantizedCalibratedCompressor, StreamSetCompressor
from .errors import PresetError
from .preset import Preset, Side

# A preset's compressors are immutable, and their tables large: made once, shared by all of its caches.
_COMPRESSORS: WeakKeyDictionary[Preset, dict[tuple[int, Side], nn.Module]] = WeakKeyDictionary()


def preset_compressor(preset: Preset, layer: int, side: Side) -> nn.Module:
    known = _COMPRESSORS.setdefault(preset, {})
    if (layer, side) not in known:
        known[layer, side] = _new_compressor(preset, layer, side)
    return known[layer, side]


def _new_compressor(preset: Preset, layer: int, side: Side) -> nn.Module:
    codec = preset.codec(layer, side)
    if codec is None:
        return IdentityCompressor()
    if isinstance(codec, StreamSetCodec):
        return StreamSetCompressor(codec, preset.n_sinks)
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
