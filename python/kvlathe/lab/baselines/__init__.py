"""Other methods to hold ours against, each from its paper's formulas. They serve the evaluation only."""

from __future__ import annotations

from .baseline import Baseline
from .catalogue import NAMES, Subject, make

__all__ = ["NAMES", "Baseline", "Subject", "make"]
