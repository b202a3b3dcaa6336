"""Auto-tuning: the search on made-up curves, and the whole way on a tiny model."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache_helpers import TAIL, hand_made_preset, model_of, preset_of
from kvlathe import (
    BudgetError,
    CalibrationOptions,
    CompressedDynamicCache,
    Corpus,
    CorpusError,
    Preset,
    PresetError,
    Quality,
    TuneOptions,
    TuneResult,
    UnverifiedPresetWarning,
    load_preset_cache,
    tune,
    verify,
)
from kvlathe.calibration.quality import upper_bound
from kvlathe.calibration.text.corpus import Document
from kvlathe.calibration.tuning import CurvePoint, describe_budget, search_bits
from kvlathe.calibration.tuning.search import verify_choice
from kvlathe.errors import EvaluationError
from tiny_models import VOCAB

# The grid of the search: multiples of 1/8 bit. Side information is 1.125 bits a value here (blocks of 8 tokens of 16
# numbers), and coefficients have from 0.5 to 8.
_GRID = [1.625 + step / 8 for step in range(61)]


def _point(bits: float, within: bool, log_excess: float = math.inf) -> CurvePoint:
    """A measurement that says whether the budget holds, but not by how much unless that is given."""
    quality = Quality(
        perplexity=10.0,
        exact_perplexity=10.0,
        kld=0.0,
        kld_median=0.0,
        kld_p99=0.0,
        kld_max=0.0,
        top1=1.0,
        n_positions=1,
        kld_by_window=(0.0,),
        log_ratio_by_window=(0.0,),
        kld_by_position=(0.0,),
        position_bin=1,
    )
    return CurvePoint(bits, quality, 0.0, 0.0, -abs(log_excess) if within else abs(log_excess))


@functools.cache
def _rates() -> list[float]:
    """What the preset makes of each grid point: widths are whole, so a little less than asked for."""
    preset = preset_of("llama")
    return [preset.with_bits(bits).bits_per_value for bits in _GRID]


def _search(is_within: Callable[[float], bool]) -> tuple[CurvePoint | None, list[CurvePoint], int]:
    n_tried = 0

    def try_bits(candidate: Preset) -> CurvePoint:
        nonlocal n_tried
        n_tried += 1
        return _point(candidate.bits_per_value, is_within(candidate.bits_per_value))

    best, curve = search_bits(preset_of("llama"), try_bits)
    return best, curve, n_tried


def test_rates_rise_along_the_grid() -> None:
    rates = _rates()
    assert rates == sorted(rates)
    assert all(bits - 0.1 < rate <= bits + 1e-9 for rate, bits in zip(rates, _GRID, strict=True))
    assert rates[-1] == pytest.approx(9.125)


@pytest.mark.parametrize("step", range(61))
def test_the_search_finds_the_least_grid_point(step: int) -> None:
    least = _rates()[step]
    best, curve, n_tried = _search(lambda bits: bits >= least)
    assert best is not None
    assert best.bits_per_value == least
    assert best in curve
    assert n_tried == len(curve) <= (8 if step == 60 else 7)  # nothing is measured twice
    rates = [point.bits_per_value for point in curve]
    assert rates == sorted(rates)


def test_the_search_reports_when_nothing_is_within() -> None:
    best, curve, n_tried = _search(lambda bits: False)
    assert best is None
    assert n_tried == len(curve) <= 8
    assert curve[-1].bits_per_value == pytest.approx(9.125)  # it did try the highest rate
    assert not any(point.within for point in curve)


def test_the_search_at_the_least_rate() -> None:
    best, _, _ = _search(lambda bits: True)
    assert best is not None
    assert best.bits_per_value == _rates()[0]


@pytest.mark.parametrize("factor_per_bit", [2.0, 4.0, 6.0])
def test_the_search_uses_how_far_off_a_measurement_is(factor_per_bit: float) -> None:
    """KLD falls by about the same factor with every bit; then a rate up to 4.5 bits takes few measurements."""
    n_tried = []
    for budget_bits in _rates()[:24]:

        def try_bits(candidate: Preset, budget_bits: float = budget_bits) -> CurvePoint:
            missing_bits = budget_bits - candidate.bits_per_value
            return _point(
                candidate.bits_per_value, missing_bits <= 0, missing_bits * math.log(factor_per_bit)
            )

        best, curve = search_bits(preset_of("llama"), try_bits)
        assert best is not None and best.bits_per_value == budget_bits
        n_tried.append(len(curve))
    assert max(n_tried) <= 5
    assert sum(n_tried) / len(n_tried) <= 4


@pytest.mark.parametrize("head_dim", [1, 2, 3])
def test_the_search_where_side_information_is_most_of_the_rate(head_dim: int) -> None:
    """The grid begins above 3.5 bits, where the search looks first otherwise."""
    preset = hand_made_preset([0] * head_dim)
    assert preset.side_bits_per_value > 3.5
    for coefficient_bits in (0.0, 1.0, 7.5):
        least = preset.side_bits_per_value + coefficient_bits

        def try_bits(candidate: Preset, least: float = least) -> CurvePoint:
            return _point(candidate.bits_per_value, candidate.bits_per_value >= least)

        best, curve = search_bits(preset, try_bits)
        assert best is not None and best.within
        assert len(curve) <= 8


@pytest.mark.parametrize("seed", range(5))
def test_a_ragged_curve_still_gives_a_rate_within(seed: int) -> None:
    """Measurements are noisy: near the border they may not be monotone. Whatever is returned was within."""
    generator = torch.Generator().manual_seed(seed)
    noise = {rate: float(torch.randn(1, generator=generator)) for rate in _rates()}
    best, curve, _ = _search(lambda bits: bits + noise[bits] >= 4.0)
    assert best is not None
    assert best.within
    assert best.bits_per_value == min(point.bits_per_value for point in curve if point.within)


# The whole way.


class Bytes:
    """A tokenizer: one token a character, folded into the tiny vocabulary."""

    bos_token_id = None
    is_fast = True

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [3 + byte % (VOCAB - 3) for byte in text.encode()]

    def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
        return ids

    def num_special_tokens_to_add(self) -> int:
        return 0


def _corpus(n_documents: int = 12) -> Corpus:
    words = "the cat sat on a mat and then it saw seven small grey mice run away from that old house".split()
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        return " ".join(words[i] for i in torch.randint(0, len(words), (150,), generator=generator).tolist())

    return Corpus.from_documents(
        "tiny words", [Document(f"document {i}", text()) for i in range(n_documents)]
    )


def _options(**changes: Any) -> TuneOptions:
    settings: dict[str, Any] = {
        "target_ppl_delta": 0.05,
        "window": 96,
        "calibration_windows": 6,
        "evaluation_windows": 4,
        "verification_windows": 4,
        "calibration": CalibrationOptions(tail=TAIL, block_len=8),
    }
    return TuneOptions(**{**settings, **changes})


@functools.cache
def _tuned(seed: int = 0, **changes: Any) -> TuneResult:
    calibration = CalibrationOptions(tail=TAIL, block_len=8, seed=seed)
    return tune(
        model_of("llama"), Bytes(), _corpus(), _options(calibration=calibration, **changes), name="tiny"
    )


def _file(result: TuneResult) -> bytes:
    return bytes(result.preset.native.to_safetensors())


def test_tune_end_to_end() -> None:
    result = _tuned()
    assert result.best.within
    assert result.best.ppl_delta_bound <= 0.05
    assert result.best in result.curve
    rates = [point.bits_per_value for point in result.curve]
    assert rates == sorted(rates)
    # Every cheaper rate that was tried failed.
    assert not any(p.within for p in result.curve if p.bits_per_value < result.best.bits_per_value)
    preset = result.preset
    verified = result.verified
    assert verified.within
    assert preset.bits_per_value == pytest.approx(verified.bits_per_value, abs=1e-6)
    assert preset.bits_per_value >= result.best.bits_per_value - 1e-6
    assert preset.meta["model"] == "tiny"
    measured = preset.meta["kvlathe"]["measured"]
    assert measured["ppl_delta"] == pytest.approx(verified.quality.ppl_delta)
    assert measured["ppl_delta_bound"] <= 0.05
    assert measured["baseline_perplexity"] == pytest.approx(verified.quality.exact_perplexity)
    assert measured["n_positions"] == 4 * 96
    assert len(measured["curve"]) == len(result.curve)
    assert preset.meta["kvlathe"]["calibration"]["n_tokens"] == 6 * 96
    assert "neither calibration nor search" in measured["text"]
    # Other text, so another perplexity: the promise is not measured where the search looked.
    assert verified.quality.exact_perplexity != result.best.quality.exact_perplexity


def test_a_tuned_preset_works() -> None:
    model = model_of("llama")
    cache = CompressedDynamicCache.from_preset(_tuned().preset, model=model, uncompressed_tail=TAIL)
    ids = torch.tensor([Bytes().encode("the cat sat on a mat and then it saw seven small grey mice")])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 5
    assert cache.get_memory_stats()["compressed_tokens"] > 0


def test_a_tuned_preset_survives_its_file(tmp_path: Any) -> None:
    preset = _tuned().preset
    for name in ("p.json", "p.safetensors"):
        preset.save(tmp_path / name)
        assert Preset.load(tmp_path / name).meta == preset.meta


def test_the_same_seed_gives_the_same_bytes() -> None:
    first = _tuned()
    second = tune(model_of("llama"), Bytes(), _corpus(), _options(), name="tiny")
    assert _file(first) == _file(second)
    assert _file(first) != _file(_tuned(seed=1))


def test_a_tighter_budget_costs_more_bits() -> None:
    loose, tight = _tuned(target_ppl_delta=0.3), _tuned(target_ppl_delta=0.005)
    assert loose.best.bits_per_value < tight.best.bits_per_value
    assert loose.preset.bits_per_value < tight.preset.bits_per_value


def test_a_kld_budget() -> None:
    result = _tuned(target_ppl_delta=None, target_kld=0.01)
    assert result.best.kld_bound <= 0.01
    assert result.best.quality.kld <= 0.01


def test_both_budgets_hold() -> None:
    both = _tuned(target_ppl_delta=0.3, target_kld=0.01)
    assert both.best.kld_bound <= 0.01
    assert both.best.ppl_delta_bound <= 0.3
    assert both.best.bits_per_value >= _tuned(target_ppl_delta=None, target_kld=0.01).best.bits_per_value


def test_an_impossible_budget() -> None:
    options = _options(target_ppl_delta=None, target_kld=1e-12)
    with pytest.raises(BudgetError, match=r"KLD at most 1e-12") as caught:
        tune(model_of("llama"), Bytes(), _corpus(), options)
    assert "9.12 bits" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_ppl_delta": None},
        {"target_ppl_delta": 0.0},
        {"target_ppl_delta": -0.1},
        {"target_ppl_delta": math.nan},
        {"target_kld": math.inf},
        {"target_kld": 0.0},
    ],
    ids=str,
)
def test_budgets_that_are_none(changes: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        _options(**changes)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, 95.0, math.nan])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(BudgetError, match=r"0\.95 stands for 95 %"):
        _options(confidence=confidence)


@pytest.mark.parametrize("name", ["evaluation_windows", "verification_windows"])
def test_one_window_bounds_nothing(name: str) -> None:
    with pytest.raises(BudgetError, match="at least 2"):
        _options(**{name: 1})


def test_windows_in_which_nothing_is_coded() -> None:
    """Every preset would be perfect there."""
    model, preset = model_of("llama"), _tuned().preset
    least = preset.n_sinks + preset.block_len + TAIL
    documents = _corpus(20).held_out
    with pytest.raises(EvaluationError, match=f"take {least}"):
        verify(model, Bytes(), documents, preset, window=least - 1, n_windows=6)
    for calibrated in (None, preset):
        with pytest.raises(EvaluationError, match=f"take {least}"):
            tune(model, Bytes(), _corpus(), _options(window=least - 1), calibrated=calibrated)


def test_windows_beyond_the_models_positions() -> None:
    model = model_of("llama")
    window = model.config.max_position_embeddings + 1
    with pytest.raises(EvaluationError, match=f"at most {window - 1}"):
        tune(model, Bytes(), _corpus(), _options(window=window))
    with pytest.raises(EvaluationError, match=f"at most {window - 1}"):
        verify(model, Bytes(), _corpus().held_out, _tuned().preset, window=window)


def test_too_little_text() -> None:
    with pytest.raises(CorpusError, match="too little text"):
        tune(model_of("llama"), Bytes(), _corpus(3), _options(calibration_windows=500))


def test_every_rate_is_shown() -> None:
    seen: list[CurvePoint] = []
    result = tune(model_of("llama"), Bytes(), _corpus(), _options(), on_point=seen.append)
    assert seen[-1] == result.verified
    assert sorted(seen[:-1], key=lambda point: point.bits_per_value) == list(result.curve)


def test_a_promise_that_fails_on_other_text_costs_bits() -> None:
    """The search's choice is raised until the budget holds on the text kept for verification."""
    preset = preset_of("llama")
    best = _point(preset.with_bits(3.0).bits_per_value, True)
    tuned, verified = verify_choice(
        preset, best, lambda p: _point(p.bits_per_value, p.bits_per_value > best.bits_per_value + 0.2)
    )
    assert verified.within
    assert tuned.bits_per_value == verified.bits_per_value
    assert best.bits_per_value + 0.2 < tuned.bits_per_value <= best.bits_per_value + 0.51
    _, hopeless = verify_choice(preset, best, lambda p: _point(p.bits_per_value, False))
    assert not hopeless.within
    # There is no rate above eight bits a coefficient to raise it to.
    highest = preset.with_bits(8.0 + preset.side_bits_per_value).bits_per_value
    tuned, _ = verify_choice(preset, _point(highest, True), lambda p: _point(p.bits_per_value, False))
    assert tuned.bits_per_value == highest


def test_a_calibration_can_be_taken_over() -> None:
    first = _tuned()
    options = _options(target_ppl_delta=0.3, calibration=CalibrationOptions(tail=TAIL, block_len=8))
    second = tune(model_of("llama"), Bytes(), _corpus(), options, calibrated=first.preset)
    assert second.preset.bits_per_value <= first.preset.bits_per_value
    same, other = (r.preset.with_bits(4.0).native.to_safetensors() for r in (first, second))
    assert bytes(same) == bytes(other)
    with pytest.raises(PresetError):
        tune(model_of("qwen2"), Bytes(), _corpus(), options, calibrated=first.preset)


def test_verify_holds_a_preset_to_its_promise() -> None:
    model, preset, documents = model_of("llama"), _tuned().preset, _corpus(20).held_out
    kept = verify(model, Bytes(), documents, preset, window=96, n_windows=6)
    assert kept.target_ppl_delta == 0.05
    assert kept.holds
    assert kept.point.ppl_delta_bound <= 0.05
    broken = verify(model, Bytes(), documents, preset, window=96, n_windows=6, target_kld=1e-9)
    assert not broken.holds
    assert broken.target_ppl_delta is None
    with pytest.raises(PresetError, match="promises nothing"):
        verify(model, Bytes(), documents, preset.with_bits(3.0), window=96, n_windows=6)
    with pytest.raises(PresetError):
        verify(model_of("qwen2"), Bytes(), documents, preset, window=96, n_windows=6)


def test_an_unverified_preset_says_so_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("kvlathe.preset._WARNED", set())
    preset = _tuned().preset
    preset.save(tmp_path / "verified.safetensors")
    preset.with_bits(3.0).save(tmp_path / "other.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_preset_cache(tmp_path / "verified.safetensors", preset.n_layers, device="cpu")
    with pytest.warns(
        UnverifiedPresetWarning, match=r"never verified at 3\.\d\d bits|never verified at 2\.9\d bits"
    ):
        load_preset_cache(tmp_path / "other.safetensors", preset.n_layers, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_preset_cache(tmp_path / "other.safetensors", preset.n_layers, device="cpu")


def test_budgets_in_words() -> None:
    assert describe_budget(_options()) == "perplexity at most +5 %"
    assert describe_budget(_options(target_kld=0.01)) == "perplexity at most +5 %, KLD at most 0.01"


def test_the_bound_lies_above_the_mean() -> None:
    samples = [0.01, 0.02, 0.015, 0.03, 0.005]
    bounds = [upper_bound(samples, confidence=c) for c in (0.5, 0.9, 0.99)]
    assert sum(samples) / 5 == pytest.approx(bounds[0], abs=0.003)
    assert bounds[0] < bounds[1] < bounds[2] <= max(samples)
    assert upper_bound([0.25] * 4) == pytest.approx(0.25)
    assert upper_bound(samples) == upper_bound(samples)
