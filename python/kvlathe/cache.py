"""`CompressedDynamicCache` and `load_preset_cache`: the seed API's entry points."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ._native import StreamSetCodec
from .compressors import IdentityCompressor, QuantizedCalibratedCompressor, StreamSetCompressor
from .errors import DeviceError, PresetError, ShapeError, UnverifiedPresetWarning
from .layer import CompressedLayer
from .preset import Preset, Side
from .stores import Policy


class CompressedDynamicCache(DynamicCache):
    """A `DynamicCache` that holds keys and values compressed.

    The first tokens that the compressors want exact (4 with our presets) and the last ``uncompressed_tail`` tokens
    stay as the model gave them; the rest is coded, in whole blocks, once the sequence is longer than
    ``compress_start_len``.

    Args:
        k_compressors: one compressor of keys a layer: `IdentityCompressor`, `QuantizedCalibratedCompressor`,
            `StreamSetCompressor`, or any module with ``compress(x)`` and ``expand(coded)``.
        v_compressors: the same for values.
        num_layers: the model's number of layers.
        compress_start_len: sequences up to this many tokens are not coded at all.
        uncompressed_tail: this many latest tokens stay exact; up to a block less one more do.

    Raises:
        ShapeError: lists of another length than ``num_layers``, negative lengths.
        PresetError: a compressor without ``compress`` or ``expand``.

    Example:
        >>> cache = CompressedDynamicCache([IdentityCompressor()] * 2, [IdentityCompressor()] * 2, num_layers=2)
        >>> cache.get_seq_length()
        0
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]  # narrower than DynamicCache's, fixed in `_build`

    def __init__(
        self,
        k_compressors: Sequence[nn.Module],
        v_compressors: Sequence[nn.Module],
        num_layers: int,
        compress_start_len: int = 0,
        uncompressed_tail: int = 0,
    ) -> None:
        self._build(k_compressors, v_compressors, num_layers, compress_start_len, uncompressed_tail, None)

    def _build(
        self,
        k_compressors: Sequence[nn.Module],
        v_compressors: Sequence[nn.Module],
        num_layers: int,
        compress_start_len: int,
        uncompressed_tail: int,
        device: torch.device | None,
    ) -> None:
        for name, given in (
            ("num_layers", num_layers),
            ("compress_start_len", compress_start_len),
            ("uncompressed_tail", uncompressed_tail),
        ):
            if not isinstance(given, int) or isinstance(given, bool) or given < (name == "num_layers"):
                least = 1 if name == "num_layers" else 0
                raise ShapeError(f"{name} is {given!r}, expected a whole number, at least {least}")
        for name, compressors in (("k_compressors", k_compressors), ("v_compressors", v_compressors)):
            if len(compressors) != num_layers:
                raise ShapeError(
                    f"{name} has {len(compressors)} entries for num_layers={num_layers}; one a layer is needed"
                )
            for layer, compressor in enumerate(compressors):
                if not (
                    callable(getattr(compressor, "compress", None))
                    and callable(getattr(compressor, "expand", None))
                ):
                    raise PresetError(
                        f"{name}[{layer}] is a {type(compressor).__name__} without compress() and expand()"
                    )
        layers = []
        for k_compressor, v_compressor in zip(k_compressors, v_compressors, strict=True):
            n_sinks = max(int(getattr(c, "n_sinks", 0)) for c in (k_compressor, v_compressor))
            policy = Policy(n_sinks, compress_start_len, uncompressed_tail)
            layers.append(CompressedLayer(k_compressor, v_compressor, policy, device))
        super().__init__()
        # A fixed list of layers instead of one class to replicate: a model with more layers must not go on unnoticed.
        self.layers = layers
        self.layer_class_to_replicate = None
        self.compress_start_len = compress_start_len
        self.uncompressed_tail = uncompressed_tail

    @classmethod
    def from_preset(
        cls,
        preset: Preset,
        *,
        model: PreTrainedModel | None = None,
        compress_start_len: int = 0,
        uncompressed_tail: int = 0,
        device: str | torch.device | None = None,
    ) -> CompressedDynamicCache:
        """A cache with a preset's codecs; given the model, checked against it.

        Raises:
            PresetError: a preset that was calibrated for another model.
            DeviceError: a device that this machine lacks.
        """
        if model is not None:
            preset.check_model(model.config)
            _warn_if_unverified(preset)
        k_compressors = [_compressor(preset, layer, "key") for layer in range(preset.n_layers)]
        v_compressors = [_compressor(preset, layer, "value") for layer in range(preset.n_layers)]
        cache = cls.__new__(cls)
        wanted = available_device(device) if device is not None else None
        cache._build(
            k_compressors, v_compressors, preset.n_layers, compress_start_len, uncompressed_tail, wanted
        )
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one layer's new keys and values; see `CompressedLayer.update`.

        Raises:
            ShapeError: a layer beyond ``num_layers``: the cache was made for another model.
        """
        if layer_idx >= len(self.layers):
            raise ShapeError(
                f"the model has a layer {layer_idx}, this cache was made for {len(self.layers)} layers; "
                f"pass num_layers=model.config.num_hidden_layers and a preset of this model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def compressor(self, layer_idx: int, side: Side) -> nn.Module:
        """The compressor of one layer's "key" or "value" side."""
        return self.layers[layer_idx].compressor(side)

    def n_sinks(self, layer_idx: int = 0) -> int:
        """First tokens of a sequence that a layer keeps exact."""
        return self.layers[layer_idx].policy.n_sinks

    def get_memory_stats(self) -> dict[str, int | float]:
        """What the cache holds, in bytes truly allocated for it.

        Returns:
            total_bytes (and total_mb, 2^20 bytes): exact_bytes of sinks, tail and uncoded sides, plus coded_bytes
            of packed blocks with gains, guards and padding. uncompressed_bytes_equivalent: what `DynamicCache`
            would take, and compression_ratio, their quotient. bits_per_value: total bits over all numbers held.
            compressed_tokens and uncompressed_tokens add up to seq_len. The codec's own tables, which all
            caches of a preset share, are not counted.
        """
        exact = coded = n_values = equivalent = 0
        for layer in self.layers:
            layer_exact, layer_coded = layer.memory_use()
            layer_values, layer_equivalent = layer.values_held()
            exact, coded = exact + layer_exact, coded + layer_coded
            n_values, equivalent = n_values + layer_values, equivalent + layer_equivalent
        total = exact + coded
        seq_len = self.get_seq_length()
        compressed = self.layers[0].n_coded
        return {
            "total_bytes": total,
            "total_mb": total / 2**20,
            "exact_bytes": exact,
            "coded_bytes": coded,
            "num_layers": len(self.layers),
            "seq_len": seq_len,
            "compressed_tokens": compressed,
            "uncompressed_tokens": seq_len - compressed,
            "compress_start_len": self.compress_start_len,
            "uncompressed_tail": self.uncompressed_tail,
            "uncompressed_bytes_equivalent": equivalent,
            "compression_ratio": equivalent / total if total else 1.0,
            "bits_per_value": 8.0 * total / n_values if n_values else 0.0,
        }

    def __repr__(self) -> str:
        stats = self.get_memory_stats()
        return (
            f"{type(self).__name__}({stats['num_layers']} layers, {stats['seq_len']} tokens, "
            f"{stats['compressed_tokens']} of them coded, {stats['total_mb']:.1f} MB)"
        )


# Models that a warning was given for.
_WARNED: set[str] = set()


def _warn_if_unverified(preset: Preset) -> None:
    """Say once a process and model that nobody has measured a preset's quality at its rate."""
    if preset.is_seed_style or preset.meta["kvlathe"]["measured"] or preset.meta["model"] in _WARNED:
        return
    _WARNED.add(preset.meta["model"])
    warnings.warn(
        f"the preset of {preset.meta['model']} was never verified at {preset.bits_per_value:.2f} bits a value: nothing "
        f"is known of its quality; see `kvlathe tune` and `kvlathe verify`",
        UnverifiedPresetWarning,
        stacklevel=3,
    )


# A preset's compressors are immutable, and their tables large: made once, shared by all of its caches.
_COMPRESSORS: WeakKeyDictionary[Preset, dict[tuple[int, Side], nn.Module]] = WeakKeyDictionary()


def _compressor(preset: Preset, layer: int, side: Side) -> nn.Module:
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


def available_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        DeviceError: this machine lacks it; the message names ``device="cpu"``.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f'device="{device}" is no device that torch knows; pass device="cpu"') from error
    available = {
        "cuda": torch.cuda.is_available,
        "mps": lambda: torch.backends.mps.is_available(),
    }
    if not available.get(wanted.type, lambda: True)():
        raise DeviceError(f'device="{device}" is not available on this machine; pass device="cpu"')
    return wanted


def load_preset_cache(
    preset_path: str | os.PathLike[str],
    num_layers: int,
    device: str | torch.device = "cuda",
    adaptive: bool = False,
    compress_after: int = 512,
    keep_recent: int = 256,
) -> CompressedDynamicCache:
    """An empty cache from a preset file, the seed's JSON or ours.

    Seed-style presets compress values only (rank and int8), as the seed does; ours compress keys and values.

    A preset whose quality was never measured at its rate gives an `UnverifiedPresetWarning`, once.

    Args:
        preset_path: a ``.json`` or ``.safetensors`` preset.
        num_layers: the model's number of layers.
        device: where the model's tensors are.
        adaptive: keep sequences up to ``compress_after`` tokens and the last ``keep_recent`` tokens exact. Without
            it everything is coded as soon as it fills a block, but for the first tokens that ours always keep.
        compress_after: tokens.
        keep_recent: tokens.

    Raises:
        PresetError: a file that cannot be read as a preset, or one for another number of layers.
        DeviceError: a device that this machine lacks.
        ShapeError: negative lengths.
    """
    preset = Preset.load(preset_path)
    if preset.n_layers != num_layers:
        raise PresetError(
            f"the preset {os.fspath(preset_path)} is for {preset.meta['model']} with {preset.n_layers} layers, "
            f"the model has {num_layers}; use the preset of this model"
        )
    _warn_if_unverified(preset)
    return CompressedDynamicCache.from_preset(
        preset,
        compress_start_len=compress_after if adaptive else 0,
        uncompressed_tail=keep_recent if adaptive else 0,
        device=device,
    )
