"""Preset files: a model's calibrated codecs, read, written and set to another rate. Works without torch."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from ._native import LowRankCodec, StreamSetCodec
from ._native import Preset as NativePreset
from .errors import UnverifiedPresetWarning

Side = Literal["key", "value"]


class Preset:
    """A calibrated preset. Immutable: `with_bits` and `with_measured` give new ones.

    Attributes:
        native: the native object that holds the arrays.
        meta: the seed's six keys, and under "kvlathe" ours (None for a seed-style file).
    """

    def __init__(self, native: NativePreset) -> None:
        self.native = native
        self.meta: dict[str, Any] = json.loads(native.meta_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preset:
        """Read a ``.json`` or ``.safetensors`` preset, the seed's or ours.

        Raises:
            PresetError: no such file, or one that is truncated, malformed or of another version.
        """
        return cls(NativePreset.read(os.fspath(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path``; the extension (``.json`` or ``.safetensors``) chooses the format."""
        self.native.write(os.fspath(path))

    @property
    def n_layers(self) -> int:
        return int(self.meta["n_layers"])

    @property
    def is_seed_style(self) -> bool:
        """Whether this is a file of the seed's kind: shared low-rank bases, no calibrated streams."""
        return self.meta["kvlathe"] is None

    @property
    def n_sinks(self) -> int:
        """First tokens that stay exact; 0 for seed-style presets."""
        return 0 if self.is_seed_style else int(self.meta["kvlathe"]["n_sinks"])

    @property
    def block_len(self) -> int:
        """Tokens of a packed block; 1 in presets of the seed's kind, which code tokens one by one."""
        return 1 if self.is_seed_style else int(self.meta["kvlathe"]["block_len"])

    @property
    def bits_per_value(self) -> float:
        """Bits a value of the coded part, side information counted."""
        if self.is_seed_style:
            return float(8 * self.meta["rank"] + 32) / float(self.meta["head_dim"])
        return float(self.meta["kvlathe"]["bits_per_value"])

    @property
    def side_bits_per_value(self) -> float:
        """Bits a value that gains, guards and drift take at any rate; 0 for seed-style presets."""
        return self.native.side_bits_per_value

    def with_bits(self, bits_per_value: float) -> Preset:
        """The same calibration at another rate: only widths change, and what was measured is dropped.

        Args:
            bits_per_value: mean over the model, side information counted: from `side_bits_per_value` to 8 bits more.

        Raises:
            PresetError: a seed-style preset.
            BudgetError, CalibrationError: a rate out of range.
        """
        return Preset(self.native.with_bits(bits_per_value))

    def with_cost_factors(self, factors: Sequence[tuple[float, float]]) -> Preset:
        """The same calibration with the importances of each layer's keys and values multiplied, and without a rate.

        Args:
            factors: for keys and for values of each layer; see `sensitivity.cost_factors`.

        Raises:
            PresetError: a seed-style preset.
            CalibrationError: factors for another number of layers, or not above 0.
        """
        return Preset(self.native.with_cost_factors([(key, value) for key, value in factors]))

    def with_measured(self, measured: dict[str, Any]) -> Preset:
        """The same preset with a record of what was measured at its rate."""
        return Preset(self.native.with_measured(json.dumps(measured)))

    def codec(self, layer: int, side: Side) -> StreamSetCodec | LowRankCodec | None:
        """The codec of one side of a layer; None where the preset leaves it exact."""
        return self.native.codec(layer, side)

    def check_model(self, config: Any) -> None:
        """Refuse a model (its config) that this preset was not calibrated for.

        Raises:
            PresetError: the config's fingerprint is another.
        """
        self.native.check_model(config_json(config))

    def __reduce__(self) -> tuple[Any, ...]:
        # As the bytes of its file: reading them runs no code, which is more than can be said of other pickles.
        return _from_bytes, (bytes(self.native.to_safetensors()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Preset:
        return self  # immutable

    def __repr__(self) -> str:
        kind = "seed-style " if self.is_seed_style else ""
        return f"<{kind}Preset of {self.meta['model']}: {self.n_layers} layers, {self.bits_per_value:.2f} bits a value>"


def _from_bytes(content: bytes) -> Preset:
    return Preset(NativePreset.from_bytes(content))


def config_json(config: Any) -> str:
    """The decoder's part of a Hugging Face config as JSON."""
    text_config = getattr(config, "get_text_config", None)
    if text_config is not None:
        config = text_config(decoder=True)
    as_dict = config.to_dict() if hasattr(config, "to_dict") else config
    return json.dumps(as_dict, default=str)


# Models that a warning was given for.
_WARNED: set[str] = set()


def warn_if_unverified(preset: Preset) -> None:
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
