"""What a cache costs in quality when it is read as coded. Calibration and tuning measure by it, `kvlathe.lab` too."""

from __future__ import annotations

from .coders import coders
from .evaluator import Evaluator, Quality, interval, upper_bound
from .two_sided_kernel import Coder

__all__ = ["Coder", "Evaluator", "Quality", "coders", "interval", "upper_bound"]
