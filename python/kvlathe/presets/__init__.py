"""Presets that come with the package: SmolLM2-135M-Instruct, tuned on the default corpus to three budgets.

| budget | perplexity at most | KLD at most, nats | for |
|---|---|---|---|
| tight | +0.3 % | 0.0015 | results that must not move |
| balanced | +1 % | 0.005 | most uses |
| small | +3 % | 0.015 | the longest contexts |
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Budget = Literal["tight", "balanced", "small"]

# (largest rise of perplexity as a fraction, largest mean KLD in nats)
BUDGETS: dict[Budget, tuple[float, float]] = {
    "tight": (0.003, 0.0015),
    "balanced": (0.01, 0.005),
    "small": (0.03, 0.015),
}


def smollm2(budget: Budget = "balanced") -> Path:
    """The file of SmolLM2-135M-Instruct's preset.

    Raises:
        KeyError: a budget that is none of the three.
    """
    if budget not in BUDGETS:
        raise KeyError(f"budget is {budget!r}, expected one of {', '.join(BUDGETS)}")
    return Path(__file__).parent / f"smollm2-135m-instruct-{budget}.safetensors"
