"""Judging caches: quality against the exact cache, size, and the runs that compare many methods."""

from __future__ import annotations

from .._two_sided_kernel import Coder
from .compressed import PresetMethod, coders
from .method import Method, coders_of
from .quality import Evaluator, Quality, interval, upper_bound
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
