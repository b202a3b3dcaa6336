"""What a rate costs on one text, held against a budget, and how a preset tells of it."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from ..._native import version
from ...cache import CompressedDynamicCache
from ...preset import Preset
from ..quality import Evaluator, Quality, coders
from .budget import CurvePoint, TuneOptions, judge


def measure(
    evaluator: Evaluator, preset: Preset, options: TuneOptions, what: str = "evaluating"
) -> CurvePoint:
    """One preset's quality and whether it is within the budget."""
    return judge(_quality(evaluator, preset, what), preset.bits_per_value, options)


def _quality(evaluator: Evaluator, preset: Preset, what: str) -> Quality:
    return evaluator.run(*coders(CompressedDynamicCache.from_preset(preset)), what=what)


class Judge:
    """One text, and what was measured on it, by rate."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._known: dict[float, Quality] = {}

    def point(self, candidate: Preset, options: TuneOptions, what: str) -> CurvePoint:
        bits = candidate.bits_per_value
        if bits not in self._known:
            self._known[bits] = _quality(self._evaluator, candidate, what)
        return judge(self._known[bits], bits, options)


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
