"""What a layer's coding costs: measured as an evaluation would, from passes that begin at that layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_helpers import seed_preset, write_json
from kvlathe import CalibrationOptions, CompressedDynamicCache, Evaluator, Preset, calibrate
from kvlathe.calibration.quality import coders
from kvlathe.calibration.replay import Replay
from kvlathe.calibration.sensitivity import cost_factors
from kvlathe.errors import CalibrationError, PresetError
from test_calibration import OPTIONS, random_windows
from tiny_models import tiny


def calibrated(name: str, **options: object) -> Preset:
    return calibrate(tiny(name), random_windows(6), options=CalibrationOptions(**OPTIONS, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3"])
def test_a_pass_from_the_middle_ends_as_a_whole_one(name: str) -> None:
    model, (ids,) = tiny(name), random_windows(1)
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with torch.no_grad():
        exact = model(input_ids=ids[None], use_cache=False).logits
        replay = Replay(model, ids)
        calls: list[int] = []
        hooks = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for module in model.modules()
            if type(module).__name__.endswith(("MLP", "Mlp"))
        ]
        for n in range(n_layers + 1):
            calls.clear()
            with replay.before(n):
                assert torch.equal(model(input_ids=ids[None], use_cache=False).logits, exact)
            assert len(calls) == n_layers - n, "the first layers are not computed"
        for hook in hooks:
            hook.remove()
        other = model(input_ids=ids.flip(0)[None], use_cache=False).logits
    assert not torch.equal(other, exact), "after the block the model computes again"


def test_factors_are_roots_of_measured_over_expected_cost() -> None:
    model, (window,) = tiny("llama"), random_windows(1, seed=5)
    preset = calibrated("llama", cost_windows=0)
    factors = cost_factors(model, preset, [window], tail=16)
    probed = preset.with_bits(max(2.25, preset.side_bits_per_value + 1))
    keys, values = coders(CompressedDynamicCache.from_preset(probed, uncompressed_tail=0))
    evaluator = Evaluator(model, [window], tail=16, n_sinks=2)
    for layer, (expected_key, expected_value) in enumerate(probed.native.expected_costs()):
        key = evaluator.run(lambda at, x, one=layer: keys(at, x) if at == one else x, None).kld
        value = evaluator.run(None, lambda at, x, one=layer: values(at, x) if at == one else x).kld
        for factor, ratio in zip(factors[layer], (key / expected_key, value / expected_value), strict=True):
            assert factor == pytest.approx(min(max(ratio, 0.1), 10.0) ** 0.5, rel=1e-4)


def test_calibration_multiplies_importances_and_records_it() -> None:
    plain, measured = calibrated("qwen2", cost_windows=0), calibrated("qwen2")
    factors = measured.meta["kvlathe"]["calibration"]["cost_factors"]
    assert "cost_factors" not in plain.meta["kvlathe"]["calibration"]
    again = plain.with_cost_factors(factors)
    assert [again.with_bits(4).native.widths(layer, "key") for layer in range(again.n_layers)] == [
        measured.with_bits(4).native.widths(layer, "key") for layer in range(measured.n_layers)
    ]
    assert measured.bits_per_value == 0


def test_what_costs_more_gets_more_bits() -> None:
    preset = calibrated("llama", cost_windows=0)
    ones = [(1.0, 1.0)] * preset.n_layers
    raised = preset.with_cost_factors([(100.0, 1.0), *ones[1:]])

    def bits(one: Preset) -> int:
        return sum(map(sum, one.with_bits(one.side_bits_per_value + 2).native.widths(0, "key")))

    assert bits(preset.with_cost_factors(ones)) == bits(preset) < bits(raised)


def test_narrow_models_are_not_measured_and_say_so() -> None:
    notes: list[str] = []
    model = tiny("llama").to(torch.bfloat16)
    options = CalibrationOptions(**OPTIONS)  # type: ignore[arg-type]
    preset = calibrate(model, random_windows(4), options=options, on_note=notes.append)
    assert "cost_factors" not in preset.meta["kvlathe"]["calibration"]
    assert any("float32" in note for note in notes)


@pytest.mark.parametrize("factors", [[(1.0, 1.0)], [(0.0, 1.0)] * 2, [(float("nan"), 1.0)] * 2])
def test_factors_that_are_none(factors: list[tuple[float, float]]) -> None:
    preset = calibrated("llama", cost_windows=0)
    assert preset.n_layers == 2
    with pytest.raises(CalibrationError, match="factor"):
        preset.with_cost_factors(factors)


def test_a_seed_preset_has_no_costs(tmp_path: Path) -> None:
    preset = Preset.load(write_json(tmp_path / "seed.json", seed_preset(2, 4, 16, 12)))
    with pytest.raises(PresetError, match="seed-style"):
        preset.with_cost_factors([(1.0, 1.0)] * 2)
    with pytest.raises(PresetError, match="seed-style"):
        preset.native.expected_costs()
