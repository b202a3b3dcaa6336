"""The digest of a preset, against docs/preset_format.md: computed anew from the numbers of the JSON container."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from cache_helpers import preset_of
from kvlathe import Preset
from kvlathe._native import Preset as NativePreset

GOLDEN = Path(__file__).parents[2] / "crates/kvlathe-preset/tests/golden"
SHIPPED = sorted(Path(str(resources.files("kvlathe") / "presets")).glob("*.safetensors"))


def expected_digest(content: dict[str, Any]) -> str:
    """The digest by the specification, from the object of a JSON container and nothing of the library."""
    ours = content["kvlathe"]
    sha = hashlib.sha256(b"kvlathe preset digest")

    def counts(*numbers: int) -> None:
        sha.update(struct.pack(f"<{len(numbers)}Q", *numbers))

    def array(values: list[Any], kind: str) -> None:
        counts(len(values))
        sha.update(struct.pack(f"<{len(values)}{kind}", *values))

    counts(
        3, content["n_layers"], ours["n_kv_heads"], content["head_dim"], ours["block_len"], ours["n_sinks"]
    )
    for layer in content["layers"]:
        if layer["rope"] is None:
            counts(0)
        else:
            rope = ours["rope"][layer["rope"]]
            counts({"half_split": 1, "interleaved": 2}[rope["pairing"]], rope["rotary_dim"])
            array(rope["inv_freq"], "d")
        for side in ("K", "V"):
            streams = layer[side]["streams"]
            counts(len(streams))
            for stream in streams:
                array(stream["mean"], "f")
                array([number for row in stream["basis"] for number in row], "f")
                array(stream["importance"], "f")
                array(stream["widths"], "B")
    return sha.hexdigest()


def read(content: dict[str, Any]) -> Preset:
    return Preset(NativePreset.from_bytes(json.dumps(content).encode()))


def json_of(preset: Preset) -> dict[str, Any]:
    content = json.loads(preset.native.to_json())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("version", [1, 2, 3])
def test_golden_presets(version: int) -> None:
    content = json.loads((GOLDEN / f"lathe-v{version}.json").read_text(encoding="utf-8"))
    digests = {Preset.load(GOLDEN / f"lathe-v{version}.{kind}").digest for kind in ("json", "safetensors")}
    assert digests == {expected_digest(content)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_presets(path: Path) -> None:
    preset = Preset.load(path)
    assert preset.digest == expected_digest(json_of(preset))


def test_each_shipped_preset_has_its_own() -> None:
    assert len({Preset.load(path).digest for path in SHIPPED}) == len(SHIPPED) > 1


def test_seed_style_presets_have_none() -> None:
    assert Preset.load(GOLDEN / "seed.json").digest is None


def test_a_preset_straight_from_calibration_and_its_files(tmp_path: Path) -> None:
    preset = preset_of("llama", 4.0)
    digest = preset.digest
    assert digest == expected_digest(json_of(preset))
    assert digest is not None
    assert len(digest) == 64
    for extension in ("json", "safetensors"):
        path = tmp_path / f"preset.{extension}"
        preset.save(path)
        assert Preset.load(path).digest == digest
    assert pickle.loads(pickle.dumps(preset)).digest == copy.deepcopy(preset).digest == digest


def test_what_changes_it_in_python() -> None:
    preset = preset_of("llama", 4.0)
    digest = preset.digest
    other_rate = preset.with_bits(preset.bits_per_value - 0.5)
    assert other_rate.digest not in (digest, None)
    assert preset.with_measured({"kld": 0.5}).digest == digest
    # Factors of 2, which float32 has exactly, change importances.
    doubled = preset.with_cost_factors([(2.0, 2.0)] * preset.n_layers)
    assert doubled.digest not in (digest, None)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "model": lambda content: content.update(model="another"),
    "created": lambda content: content["kvlathe"].update(created="1999-12-31"),
    "fingerprint": lambda content: content["kvlathe"].update(fingerprint="", cache_fingerprint="ab" * 32),
    "library": lambda content: content["kvlathe"].update(library_version="99"),
    "records": lambda content: content["kvlathe"].update(measured={}, calibration={"seed": 1}),
    "rate": lambda content: content["kvlathe"].update(bits_per_value=1.0),
    "version": lambda content: content["kvlathe"].update(format_version=2),
    "shared mean": lambda content: content["layers"][0]["K"].update(mean=[0.0] * content["head_dim"]),
    "order of rotations": lambda content: (
        content["kvlathe"]["rope"].reverse(),
        [layer.update(rope=1 - layer["rope"]) for layer in content["layers"] if layer["rope"] is not None],
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_does_not_change_it(change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((GOLDEN / "lathe-v3.json").read_text(encoding="utf-8"))
    digest = read(content).digest
    before = copy.deepcopy(content)
    change(content)
    assert content != before
    assert read(content).digest == digest == expected_digest(content)
