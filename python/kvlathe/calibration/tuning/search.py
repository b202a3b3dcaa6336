"""The search: the fewest bits within a budget, and a little more where other text asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...preset import Preset
from .budget import CurvePoint

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


def verify_choice(
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
