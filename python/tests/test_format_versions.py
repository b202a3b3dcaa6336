"""Presets of versions 1 and 2 of the format stay readable; they become presets of today's blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache_helpers import model_of, preset_of, random_kv
from kvlathe import (
    CompressedDynamicCache,
    Preset,
    PresetError,
    StreamSetCompressor,
    UnverifiedPresetWarning,
)
from kvlathe._native import Preset as NativePreset
from kvlathe.preset import Side

GOLDEN = Path(__file__).parents[2] / "crates/kvlathe-preset/tests/golden"
SIDES: tuple[Side, ...] = ("key", "value")


def _rate_of_the_blocks(preset: Preset) -> float:
    """Mean over the preset's codecs, from the bytes of their blocks."""
    codecs = [preset.codec(layer, side) for layer in range(preset.n_layers) for side in SIDES]
    rates = [8 * c.block_bytes / (c.n_heads * c.head_dim * c.block_len) for c in codecs if c is not None]
    assert len(rates) == 2 * preset.n_layers
    return sum(rates) / len(rates)


@pytest.mark.parametrize("extension", ["json", "safetensors"])
def test_version_1_is_readable(tmp_path: Path, extension: str) -> None:
    path = GOLDEN / f"lathe-v1.{extension}"
    assert b'"format_version":1' in path.read_bytes().replace(b"\\", b"")
    preset = Preset.load(path)
    lathe = preset.meta["kvlathe"]
    assert lathe["format_version"] == 3
    # Measured were blocks of version 1.
    assert lathe["measured"] == {}
    assert lathe["calibration"]["n_tokens"] == 65536
    # 2 bytes, 32 of tokens and 2 of drift, for 32 tokens of 4 numbers.
    assert preset.side_bits_per_value == 8 * (2 + 32 + 2) / (4 * 32)
    widths = [
        w for layer in range(3) for side in SIDES for head in preset.native.widths(layer, side) for w in head
    ]
    assert set(widths) == {0, 2, 4, 8}
    assert preset.bits_per_value == pytest.approx(sum(widths) / len(widths) + preset.side_bits_per_value)
    assert preset.bits_per_value == pytest.approx(_rate_of_the_blocks(preset))
    for layer in range(3):
        for side in SIDES:
            compressor = StreamSetCompressor(preset.codec(layer, side), preset.n_sinks)
            x = random_kv(64, dim=4)[0]
            assert bool(compressor.expand(compressor.compress(x, 4), 4).isfinite().all())
    again = tmp_path / f"again.{extension}"
    preset.save(again)
    assert Preset.load(again).meta == preset.meta
    assert Preset.load(again).native.to_safetensors() == preset.native.to_safetensors()
    assert Preset.load(again).digest == preset.digest


@pytest.mark.parametrize("extension", ["json", "safetensors"])
def test_version_2_keeps_all_that_it_says(extension: str) -> None:
    path = GOLDEN / f"lathe-v2.{extension}"
    assert b'"format_version":2' in path.read_bytes().replace(b"\\", b"")
    old, new = Preset.load(path), Preset.load(GOLDEN / f"lathe-v3.{extension}")
    assert old.meta["kvlathe"]["format_version"] == 3
    assert old.meta["kvlathe"]["measured"]["kld"] == 0.0014
    assert old.meta == new.meta
    assert old.digest == new.digest
    assert old.native.to_safetensors() == new.native.to_safetensors()


def test_a_version_to_come_is_refused() -> None:
    content = json.loads((GOLDEN / "lathe-v3.json").read_text(encoding="utf-8"))
    content["kvlathe"].update(format_version=5)
    with pytest.raises(PresetError, match="format version 5 and this library reads up to 4; upgrade kvlathe"):
        NativePreset.from_bytes(json.dumps(content).encode())


def test_a_calibration_of_version_1_can_be_moved_to_another_rate() -> None:
    preset = Preset.load(GOLDEN / "lathe-v1.safetensors")
    moved = preset.with_bits(preset.side_bits_per_value + 2.5)
    widths = {w for layer in range(3) for side in SIDES for h in moved.native.widths(layer, side) for w in h}
    assert widths & {1, 3}
    assert moved.bits_per_value == pytest.approx(_rate_of_the_blocks(moved))


def test_a_preset_of_version_1_says_that_nothing_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlathe.preset._WARNED", set())
    made = preset_of("llama", 4.0)
    content = json.loads(made.native.to_json())
    content["kvlathe"].update(
        format_version=1, bits_per_value=5.0, measured={"kld": 0.01, "target_kld": 0.02}
    )
    preset = Preset(NativePreset.from_bytes(json.dumps(content).encode()))
    assert preset.meta["kvlathe"]["measured"] == {}
    assert preset.bits_per_value == pytest.approx(made.bits_per_value)
    with pytest.warns(UnverifiedPresetWarning, match=r"never verified at 5\.1\d bits"):
        cache = CompressedDynamicCache.from_preset(preset, model=model_of("llama"), uncompressed_tail=0)
    cache.update(*random_kv(40), 0)
    # From version 2 on the record holds.
    for version in (2, 3):
        content["kvlathe"].update(format_version=version)
        preset = Preset(NativePreset.from_bytes(json.dumps(content).encode()))
        assert preset.meta["kvlathe"]["measured"]["kld"] == 0.01


def test_equal_codecs_whatever_the_version() -> None:
    """Transforms and widths of older presets are taken as they are."""
    content = json.loads(preset_of("llama", 4.0).native.to_json())
    texts = []
    for version in (1, 2, 3):
        content["kvlathe"].update(format_version=version)
        texts.append(json.dumps(content).encode())
    presets = [Preset(NativePreset.from_bytes(text)) for text in texts]
    assert len({preset.digest for preset in presets}) == 1
    first, second, third = (StreamSetCompressor(preset.codec(0, "key")) for preset in presets)
    x = random_kv(64)[0]
    assert torch.equal(first.compress(x, 4), third.compress(x, 4))
    assert torch.equal(second.compress(x, 4), third.compress(x, 4))
