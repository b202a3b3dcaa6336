"""Auto-tuning: the fewest bits within a quality budget. One calibration, then a one-dimensional search."""

from __future__ import annotations

from .budget import CurvePoint, TuneOptions, describe_budget, judge
from .measurement import measure, record
from .search import search_bits
from .tuner import Tuner, TuneResult, calibrate_on, tune

__all__ = [
    "CurvePoint",
    "TuneOptions",
    "TuneResult",
    "Tuner",
    "calibrate_on",
    "describe_budget",
    "judge",
    "measure",
    "record",
    "search_bits",
    "tune",
]
