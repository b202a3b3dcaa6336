"""The budget: what tuning may cost in quality, and whether a rate keeps within it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...errors import BudgetError, CorpusError
from ..basis import CalibrationOptions
from ..quality import Quality, upper_bound


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
            For want of text; text that is read serves as well or better. See `sampled_windows`.
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


def cannot_be_met(point: CurvePoint, options: TuneOptions) -> str:
    """What to tell who asked for a budget that ``point``, the best there is, exceeds."""
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
