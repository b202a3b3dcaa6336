"""The usual grid, length by depth, one panel a cache. Needs matplotlib, which is imported when it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ..evaluation.plots import styled
from .run import Trial
from .table import by_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4  # panels beside each other
_LEAST_LOG_PROB = -3.0  # nats a token; whatever is worse is as dark as this


def found_grid(trials: Sequence[Trial]) -> Figure:
    """Share of needles that greedy decoding gives exactly."""
    return _grid(trials, lambda trial: float(trial.found), (0.0, 1.0), "needles found, share", "{:.0%}")


def log_probability_grid(trials: Sequence[Trial]) -> Figure:
    """Mean log-probability a token of the answer."""
    label = "log-probability of the answer, nats a token"
    return _grid(trials, lambda trial: trial.log_prob_per_token, (_LEAST_LOG_PROB, 0.0), label, "{:.2f}")


def _grid(
    trials: Sequence[Trial],
    value: Callable[[Trial], float],
    limits: tuple[float, float],
    label: str,
    form: str,
) -> Figure:
    lengths = sorted({trial.length for trial in trials})
    depths = sorted({trial.depth for trial in trials})
    caches = by_name(trials)
    n_columns = min(_COLUMNS, len(caches))
    n_rows = math.ceil(len(caches) / n_columns)
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(
            figsize=(1.3 + n_columns * (0.9 + 0.62 * len(lengths)), 0.9 + n_rows * (0.9 + 0.4 * len(depths))),
            layout="constrained",
        )
        panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes in panels[len(caches) :]:
            axes.set_visible(False)
        for axes, (name, of_cache) in zip(panels, caches.items(), strict=False):
            cells = [[_mean(of_cache, value, length, depth) for length in lengths] for depth in depths]
            # Light is good and dark is bad, for every kind of colour vision and in print.
            image = axes.imshow(
                cells, aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1], interpolation="nearest"
            )
            middle = sum(limits) / 2
            for row, of_depth in enumerate(cells):
                for column, cell in enumerate(of_depth):
                    if not math.isnan(cell):
                        colour = "black" if cell > middle else "white"
                        axes.text(
                            column, row, form.format(cell), ha="center", va="center", color=colour, fontsize=8
                        )
            axes.grid(False)
            axes.set_title(name, fontsize=9.5)
            axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        figure.supxlabel("length, tokens", fontsize=10)
        figure.supylabel("depth of the needle", fontsize=10)
        figure.colorbar(image, ax=list(panels), label=label, pad=0.01)
        return figure


def _mean(trials: Sequence[Trial], value: Callable[[Trial], float], length: int, depth: float) -> float:
    """The cell's mean, NaN (drawn as a hole) where nothing was run."""
    chosen = [value(trial) for trial in trials if trial.length == length and trial.depth == depth]
    return fmean(chosen) if chosen else math.nan


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


#: File name and function of every plot, in the order of reports.
PLOTS = {"needle-found": found_grid, "needle-log-probability": log_probability_grid}
