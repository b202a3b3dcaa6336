"""Preset files: a model's calibrated codecs, read, written and set to another rate. Works without torch."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakSet

from ._native import LowRankCodec, StreamSetCodec
from ._native import Preset as NativePreset
from .errors import PresetError, UnverifiedPresetWarning
from .saved import by_maker, maker

Side = Literal["key", "value"]

# All presets that somebody holds.
_ALIVE: WeakSet[Preset] = WeakSet()


class Preset:
    """A calibrated preset. Immutable: `with_bits` and `with_measured` give new ones.

    Attributes:
        native: the native object that holds the arrays.
        meta: the seed's six keys, and under "kvlathe" ours (None for a seed-style file).
    """

    def __init__(self, native: NativePreset) -> None:
        self.native = native
        self.meta: dict[str, Any] = json.loads(native.meta_json())
        # Its codecs' compressors, made once and shared by all of its caches: tables are large.
        self._compressors: dict[tuple[int, Side], Any] = {}
        _ALIVE.add(self)

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
    def digest(self) -> str | None:
        """What packed blocks depend on, hashed: 64 lower-case hex digits of SHA-256; None for seed-style presets.

        Presets of equal digests pack equal blocks and read one another's. Names, dates, what was measured and the
        version of the file are no part of it (docs/preset_format.md, "Digest").
        """
        return self.native.digest

    @property
    def n_layers(self) -> int:
        return int(self.meta["n_layers"])

    @property
    def layer_shapes(self) -> list[tuple[int, int, int] | None]:
        """Of each layer: KV heads (0 in a seed-style preset), components of a key and of a value; None where it is not
        coded.
        """
        return self.native.layer_shapes

    @property
    def coded_layers(self) -> list[int]:
        """Indices of the layers that are coded."""
        return [layer for layer, shape in enumerate(self.layer_shapes) if shape is not None]

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
        return by_maker("preset", bytes(self.native.to_safetensors()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Preset:
        return self  # immutable

    def __repr__(self) -> str:
        kind = "seed-style " if self.is_seed_style else ""
        what = f"{described_layers(self)}, {self.bits_per_value:.2f} bits a value"
        return f"<{kind}Preset of {self.meta['model']}: {what}>"


def described_layers(preset: Preset) -> str:
    """How many layers there are, and how many are coded where not all are."""
    n_coded = len(preset.coded_layers)
    return (
        f"{preset.n_layers} layers"
        if n_coded == preset.n_layers
        else f"{n_coded} of {preset.n_layers} layers"
    )


def loaded_preset(digest: str) -> Preset:
    """The preset of that digest which this process holds, or one that comes with the package.

    Raises:
        PresetError: there is none.
    """
    for preset in list(_ALIVE):
        if preset.digest == digest:
            return preset
    from .presets import BUDGETS, smollm2

    for budget in BUDGETS:
        preset = Preset.load(smollm2(budget))
        if preset.digest == digest:
            return preset
    raise PresetError(
        f"this was packed with the preset of the digest {digest[:12]}…, which is not loaded in this process; load it "
        f"first (preset = kvlathe.Preset.load(path)) and hold it while you unpickle"
    )


@maker("preset")
def _from_bytes(content: bytes) -> Preset:
    return Preset(NativePreset.from_bytes(content))


def config_json(config: Any) -> str:
    """The decoder's part of a Hugging Face config as JSON."""
    text_config = getattr(config, "get_text_config", None)
    if text_config is not None:
        config = text_config(decoder=True)
    as_dict = config.to_dict() if hasattr(config, "to_dict") else config
    return json.dumps(_finite(as_dict), default=str)


def _finite(value: Any) -> Any:
    """The same with infinity and NaN as words: JSON has no numbers for them, and limits of time steps are infinite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
