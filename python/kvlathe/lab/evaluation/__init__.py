"""Judging caches: quality against the exact cache, size, and the runs that compare many methods."""

from __future__ import annotations

from ...calibration.quality import Coder, Evaluator, Quality, coders, interval, upper_bound
from .compressed import PresetMethod
from .method import Method, coders_of
from .run import Result, Results, Setting, evaluate
from .size import CacheSize, cache_size

__all__ = [
    "CacheSize",
    "Coder",
    "Evaluator",
    "Method",
    "PresetMethod",
    "Quality",
    "Result",
    "Results",
    "Setting",
    "cache_size",
    "coders",
    "coders_of",
    "evaluate",
    "interval",
    "upper_bound",
]
