"""Calibration on tiny models: with and without gradients, deterministic, and refusing what cannot work."""

from __future__ import annotations

import pytest
import torch

from kvlathe import CalibrationOptions, CompressedDynamicCache, Evaluator, calibrate
from kvlathe.calibration.quality import coders
from kvlathe.errors import CalibrationError
from tiny_models import VOCAB, tiny

OPTIONS = {"block_len": 8, "tail": 16, "n_sinks": 2}


def random_windows(count: int, length: int = 96, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3"])
def test_more_bits_are_better_and_eight_are_nearly_exact(name: str, gradients: bool) -> None:
    model = tiny(name)
    preset = calibrate(model, random_windows(8), options=CalibrationOptions(gradients=gradients, **OPTIONS))
    evaluator = Evaluator(model, random_windows(3, seed=2), tail=16, n_sinks=2)
    klds = []
    for bits in (0.0, 2.0, 4.0, 8.0):
        cache = CompressedDynamicCache.from_preset(
            preset.with_bits(bits + preset.side_bits_per_value), uncompressed_tail=0
        )
        klds.append(evaluator.run(*coders(cache)).kld)
    assert klds == sorted(klds, reverse=True), klds
    assert klds[-1] <= 1e-3 * klds[0], klds


def test_the_preset_says_how_it_was_made() -> None:
    model = tiny("llama")
    preset = calibrate(
        model, random_windows(4), text_name="noise", options=CalibrationOptions(gradients=False, **OPTIONS)
    )
    calibration = preset.meta["kvlathe"]["calibration"]
    assert calibration["metric"] == "queries and output projection"
    assert (calibration["text"], calibration["n_tokens"], calibration["n_windows"]) == ("noise", 4 * 96, 4)
    preset.check_model(model.config)


def test_equal_seeds_give_equal_presets() -> None:
    model, windows = tiny("qwen2"), random_windows(4)
    first, again, other = (
        calibrate(model, windows, options=CalibrationOptions(seed=seed, **OPTIONS)).native.to_safetensors()
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other, "another seed samples other tokens"


def test_windows_without_far_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no windows"):
        calibrate(tiny("llama"), [])
    with pytest.raises(CalibrationError, match="tail of 16"):
        calibrate(tiny("llama"), random_windows(2, length=18), options=CalibrationOptions(**OPTIONS))
