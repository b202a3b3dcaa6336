"""Auto-tuning: the fewest bits within a quality budget. One calibration, then a one-dimensional search.

The search looks at the same text again and again and so flatters what it finds; what a preset promises is therefore
measured once more, on text that neither the calibration nor the search saw.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ._native import version
from .cache import CompressedDynamicCache
from .calibration import CalibrationOptions, calibrate
from .corpus import Corpus, halves
from .errors import BudgetError, CorpusError
from .evaluation import Evaluator, Quality, coders, upper_bound
from .preset import Preset
from .sampled_text import sampled_windows
from .token_windows import windows
from .window_length import check_model_reads, check_reads_coded

# The search works on this grid, in bits a value; finer is below the noise of a measurement.
_GRID = 1 / 8
_MOST_COEFFICIENT_BITS = 8.0
_LEAST_COEFFICIENT_BITS = 0.5
# Where the search begins, and what a bit a value does to the KLD until two measurements tell: it falls to a quarter,
# as a quantiser's squared error does.
_LIKELY_BITS = 2.5
_LOG_PER_BIT = math.log(4)
# A measurement that far off the budget tells little of how far.
_LONGEST_LEAP = round(1.5 / _GRID)
# So many guesses from the curve's shape, then bisection: it is sure to end.
_N_GUESSES = 5
# Where the promise does not hold on the text kept for that, the rate is raised by these steps of the grid.
_RAISES = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class TuneOptions:
    """What to calibrate on, and what to hold.

    Attributes:
        target_ppl_delta: largest relative rise of perplexity, 0.05 = +5 %; None for no such limit.
        target_kld: largest mean KL divergence in nats; None for no such limit.
        window: tokens of a window of text.
        calibration_windows, evaluation_windows, verification_windows: how many to calibrate, to search and to verify
            on; from different documents.
        sampled_windows: how many of the calibration's windows the model writes itself, 0 to `calibration_windows`.
            For want of text; text that is read serves as well or better. See `kvlathe.sampled_text.sampled_windows`.
        confidence: the budget must hold for the one-sided bootstrap bound of this confidence, not for the mean.
        calibration: how to calibrate. Its seed also chooses windows.
    """

    target_ppl_delta: float | None = 0.05
    target_kld: float | None = None
    window: int = 1024
    calibration_windows: int = 32
    sampled_windows: int = 0
    evaluation_windows: int = 12
    verification_windows: int = 12
    confidence: float = 0.95
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        if self.target_ppl_delta is None and self.target_kld is None:
            raise BudgetError("no budget: give target_ppl_delta, target_kld or both")
        for name, value in (("target_ppl_delta", self.target_ppl_delta), ("target_kld", self.target_kld)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise BudgetError(
                    f"{name} is {value}, expected a positive number (0.05 stands for +5 % perplexity)"
                )
        if not 0.5 <= self.confidence < 1:
            raise BudgetError(
                f"confidence is {self.confidence}, expected 0.5 or more and less than 1 (0.95 stands for 95 %)"
            )
        if min(self.evaluation_windows, self.verification_windows) < 2:
            raise BudgetError(
                f"{self.evaluation_windows} windows to search and {self.verification_windows} to verify on, expected "
                f"at least 2 of each: one tells nothing of how much windows differ"
            )
        if not 0 <= self.sampled_windows <= self.calibration_windows:
            raise CorpusError(
                f"sampled_windows is {self.sampled_windows}, expected 0 to {self.calibration_windows}: they are "
                "part of calibration_windows"
            )


@dataclass(frozen=True)
class CurvePoint:
    """One rate that the search tried.

    Attributes:
        bits_per_value: of the coded part, side information included.
        ppl_delta_bound, kld_bound: one-sided upper bounds of the relative rise of perplexity and of the mean KLD.
        log_excess: ln(bound / budget), the larger of the two; above 0 the budget is exceeded.
    """

    bits_per_value: float
    quality: Quality
    ppl_delta_bound: float
    kld_bound: float
    log_excess: float

    @property
    def within(self) -> bool:
        """Whether the budget holds."""
        return self.log_excess <= 0


@dataclass(frozen=True)
class TuneResult:
    """The tuned preset.

    Attributes:
        curve: every rate that the search tried, by rising rate.
        best: the one it chose.
        verified: the preset's own rate, on text that the search did not see; above `best` where that failed there.
    """

    preset: Preset
    curve: tuple[CurvePoint, ...]
    best: CurvePoint
    verified: CurvePoint


def judge(quality: Quality, bits_per_value: float, options: TuneOptions) -> CurvePoint:
    """Holds a measurement against the budget."""
    confidence = options.confidence
    ppl_bound = math.expm1(upper_bound(quality.log_ratio_by_window, confidence=confidence))
    kld_bound = upper_bound(quality.kld_by_window, confidence=confidence)
    held = ((ppl_bound, options.target_ppl_delta), (kld_bound, options.target_kld))
    log_excess = max(_log_ratio(bound, budget) for bound, budget in held if budget is not None)
    return CurvePoint(bits_per_value, quality, ppl_bound, kld_bound, log_excess)


def _log_ratio(bound: float, budget: float) -> float:
    """ln(bound / budget): −∞ where nothing is lost, ∞ where the bound is no number."""
    if math.isnan(bound):
        return math.inf
    return math.log(bound / budget) if bound > 0 else -math.inf


def measure(
    evaluator: Evaluator, preset: Preset, options: TuneOptions, what: str = "evaluating"
) -> CurvePoint:
    """One preset's quality and whether it is within the budget."""
    return judge(_quality(evaluator, preset, what), preset.bits_per_value, options)


def _quality(evaluator: Evaluator, preset: Preset, what: str) -> Quality:
    return evaluator.run(*coders(CompressedDynamicCache.from_preset(preset)), what=what)


def _most_bits(preset: Preset) -> float:
    """The rate at which every coefficient has the widest width."""
    return _MOST_COEFFICIENT_BITS + preset.side_bits_per_value


def search_bits(
    preset: Preset, try_bits: Callable[[Preset], CurvePoint]
) -> tuple[CurvePoint | None, list[CurvePoint]]:
    """The fewest bits within the budget, in three or four measurements mostly, as log KLD is nearly linear in bits.

    Returns:
        The best point (None if even the highest rate of the grid is not within) and all points by rising rate.
    """
    # Rates are multiples of the grid, side information included.
    least = math.ceil(preset.side_bits_per_value / _GRID) * _GRID + _LEAST_COEFFICIENT_BITS
    n_steps = int((_most_bits(preset) - least) / _GRID)
    points: dict[int, CurvePoint] = {}

    # Not within at `low` and below, within at `high` and above, where those were tried.
    low, high = -1, n_steps
    step = min(max(0, round((_LIKELY_BITS - least) / _GRID)), n_steps)
    while step not in points:
        points[step] = point = try_bits(preset.with_bits(least + step * _GRID))
        if point.within:
            high = step
        else:
            low = step
        step = _next_step(points, low, high) if high - low > 1 else high
    curve = [points[step] for step in sorted(points)]
    best = points[high]
    return (best if best.within else None), curve


def _next_step(points: dict[int, CurvePoint], low: int, high: int) -> int:
    """Where the budget is probably met first, between `low` and `high`, neither included."""
    finite = [(step, point.log_excess) for step, point in points.items() if math.isfinite(point.log_excess)]
    if len(points) >= _N_GUESSES or not finite:
        return (low + high) // 2
    (near, excess), *others = sorted(finite, key=lambda of: abs(of[1]))
    slope = -_LOG_PER_BIT * _GRID  # a step of the grid
    if others:
        other, its_excess = others[0]
        measured = (its_excess - excess) / (other - near)
        slope = measured if measured < 0 else slope
    leap = min(max(-excess / slope, -_LONGEST_LEAP), _LONGEST_LEAP)
    return min(max(math.ceil(near + leap), low + 1), high - 1)


def tune(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    options: TuneOptions | None = None,
    *,
    name: str = "",
    calibrated: Preset | None = None,
    on_note: Callable[[str], None] | None = None,
    on_point: Callable[[CurvePoint], None] | None = None,
) -> TuneResult:
    """Calibrate a model, find the fewest bits within the budget, and verify them.

    Args:
        model: a decoder with standard attention.
        tokenizer: its tokenizer.
        corpus: text; one part calibrates, another, of other documents, guides the search, a third verifies.
        name: what the preset calls the model.
        calibrated: a preset of this model whose calibration is taken over instead of making one.
        on_note: takes sentences for people.
        on_point: takes every rate as it is tried.

    Raises:
        BudgetError: no rate meets the budget.
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
        CalibrationError, ModelError: see `calibrate`.
        PresetError: `calibrated` belongs to another model.
    """
    options = options or TuneOptions()
    if calibrated is None:
        calibrated = calibrate_on(model, tokenizer, corpus, options, name=name, on_note=on_note)
    return Tuner(model, tokenizer, corpus, calibrated, options).fit(
        options, on_note=on_note, on_point=on_point
    )


def calibrate_on(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    options: TuneOptions,
    *,
    name: str = "",
    on_note: Callable[[str], None] | None = None,
) -> Preset:
    """`calibrate` on a corpus's calibration side and on what the model writes itself, as many windows of each as
    ``options`` say.

    Raises:
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
        CalibrationError, ModelError: see `calibrate`.
    """
    seed, n_sampled = options.calibration.seed, options.sampled_windows
    # Before the long part, not after it.
    check_model_reads(model.config, options.window)
    settings = options.calibration
    check_reads_coded(
        options.window, n_sinks=settings.n_sinks, tail=settings.tail, block_len=settings.block_len
    )
    n_read = options.calibration_windows - n_sampled
    text = windows(tokenizer, corpus.calibration, options.window, n_read, seed) if n_read else []
    text_name = corpus.name
    if n_sampled:
        # Costs are measured on text that was read, the first window: the model's own is too unlike any other.
        settings = replace(settings, cost_windows=min(settings.cost_windows, 1 if n_read else 0))
        text += sampled_windows(model, tokenizer, options.window, n_sampled, seed=seed)
        text_name = f"{corpus.name} and the model's own" if n_read else "the model's own"
    return calibrate(model, text, name=name, text_name=text_name, options=settings, on_note=on_note)


class Tuner:
    """Finds rates for budgets: one calibration and one text; what was measured for one budget serves the next.

    Args:
        corpus: its held-out part is split, by document, in text for the search and text to verify on.
        calibrated: a preset of this model; its rate does not matter.
        options: how much text, which tail; budgets are those of `fit`.

    Raises:
        PresetError: `calibrated` belongs to another model.
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        corpus: Corpus,
        calibrated: Preset,
        options: TuneOptions,
    ) -> None:
        calibrated.check_model(model.config)
        check_model_reads(model.config, options.window)
        check_reads_coded(
            options.window,
            n_sinks=calibrated.n_sinks,
            tail=options.calibration.tail,
            block_len=calibrated.block_len,
        )
        self._calibrated, self._text_name = calibrated, corpus.name
        seed, tail = options.calibration.seed, options.calibration.tail
        sides = halves(corpus.held_out, seed=seed)
        n_windows = (options.evaluation_windows, options.verification_windows)
        self._search, self._verification = (
            _Judge(
                Evaluator(
                    model,
                    windows(tokenizer, side, options.window, n, seed),
                    tail=tail,
                    n_sinks=calibrated.n_sinks,
                )
            )
            for side, n in zip(sides, n_windows, strict=True)
        )

    def fit(
        self,
        options: TuneOptions,
        *,
        on_note: Callable[[str], None] | None = None,
        on_point: Callable[[CurvePoint], None] | None = None,
    ) -> TuneResult:
        """The fewest bits within the budget of ``options``, verified; see `tune`.

        Raises:
            BudgetError: no rate meets the budget.
        """

        def trying(text: _Judge, verb: str) -> Callable[[Preset], CurvePoint]:
            def try_bits(candidate: Preset) -> CurvePoint:
                point = text.point(candidate, options, f"{verb} {candidate.bits_per_value:.2f} bits")
                if on_point is not None:
                    on_point(point)
                return point

            return try_bits

        best, curve = search_bits(self._calibrated, trying(self._search, "trying"))
        if best is None:
            raise BudgetError(_cannot_be_met(curve[-1], options))
        if on_note is not None:
            on_note("verifying on text that the search did not see")
        tuned, verified = _verify(self._calibrated, best, trying(self._verification, "verifying"))
        if not verified.within:
            raise BudgetError(_cannot_be_met(verified, options))
        tuned = tuned.with_measured(record(verified, curve, self._text_name, options))
        return TuneResult(tuned, tuple(curve), best, verified)


class _Judge:
    """One text, and what was measured on it, by rate."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._known: dict[float, Quality] = {}

    def point(self, candidate: Preset, options: TuneOptions, what: str) -> CurvePoint:
        bits = candidate.bits_per_value
        if bits not in self._known:
            self._known[bits] = _quality(self._evaluator, candidate, what)
        return judge(self._known[bits], bits, options)


def _verify(
    preset: Preset, best: CurvePoint, try_bits: Callable[[Preset], CurvePoint]
) -> tuple[Preset, CurvePoint]:
    """The search's choice, or a little more, on other text; the last one tried if nothing holds."""
    most = _most_bits(preset)
    for steps in _RAISES:
        candidate = preset.with_bits(min(most, best.bits_per_value + steps * _GRID + 1e-9))
        point = try_bits(candidate)
        if point.within:
            break
    return candidate, point


def _cannot_be_met(point: CurvePoint, options: TuneOptions) -> str:
    return (
        f"the budget ({describe_budget(options)}) cannot be met: at {point.bits_per_value:.2f} bits a value the "
        f"perplexity rises by up to {100 * point.ppl_delta_bound:+.3f} % and the KLD is up to {point.kld_bound:.5f} "
        f"(bounds of {100 * options.confidence:.0f} % confidence). Raise the budget, or measure on more windows "
        f"if the bounds are much above the means"
    )


def describe_budget(options: TuneOptions) -> str:
    """The budget in words."""
    limits = []
    if options.target_ppl_delta is not None:
        limits.append(f"perplexity at most {100 * options.target_ppl_delta:+g} %")
    if options.target_kld is not None:
        limits.append(f"KLD at most {options.target_kld:g}")
    return ", ".join(limits)


def record(
    point: CurvePoint, curve: list[CurvePoint], text_name: str, options: TuneOptions
) -> dict[str, Any]:
    """What a preset says of its measurement."""
    quality = point.quality
    return {
        "text": f"{text_name} (seen by neither calibration nor search)",
        "windows": options.verification_windows,
        "window": options.window,
        "n_positions": quality.n_positions,
        "tail": options.calibration.tail,
        "n_sinks": options.calibration.n_sinks,
        "baseline_perplexity": quality.exact_perplexity,
        "perplexity": quality.perplexity,
        "ppl_delta": quality.ppl_delta,
        "ppl_delta_bound": point.ppl_delta_bound,
        "kld": quality.kld,
        "kld_bound": point.kld_bound,
        "kld_p99": quality.kld_p99,
        "top1": quality.top1,
        "confidence": options.confidence,
        "target_ppl_delta": options.target_ppl_delta,
        "target_kld": options.target_kld,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "library_version": version(),
        "torch_version": torch.__version__,
        "curve": [
            {
                "bits_per_value": point.bits_per_value,
                "ppl_delta": point.quality.ppl_delta,
                "kld": point.quality.kld,
                "top1": point.quality.top1,
                "within": point.within,
            }
            for point in curve
        ],
    }
