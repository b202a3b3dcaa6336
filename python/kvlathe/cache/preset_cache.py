"""`load_preset_cache`: the seed's way from a preset file to a cache."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedConfig

from ..errors import PresetError
from ..preset import Preset, warn_if_unverified
from .dynamic_cache import CompressedDynamicCache


def load_preset_cache(
    preset_path: str | os.PathLike[str],
    num_layers: int,
    device: str | torch.device = "cuda",
    adaptive: bool = False,
    compress_after: int = 512,
    keep_recent: int = 256,
    *,
    config: PreTrainedConfig | None = None,
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
        config: the model's; see `CompressedDynamicCache`. The preset is checked against it.

    Raises:
        PresetError: a file that cannot be read as a preset, or one for another model or number of layers.
        DeviceError: a device that this machine lacks.
        ShapeError: negative lengths.
    """
    preset = Preset.load(preset_path)
    if preset.n_layers != num_layers:
        raise PresetError(
            f"the preset {os.fspath(preset_path)} is for {preset.meta['model']} with {preset.n_layers} layers, "
            f"the model has {num_layers}; use the preset of this model"
        )
    warn_if_unverified(preset)
    return CompressedDynamicCache._from_preset(
        preset, config, compress_after if adaptive else 0, keep_recent if adaptive else 0, device
    )
