"""Plots of an evaluation. They need matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError
from .run import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people who are colour-blind. Ours get the strongest two.
_OURS = ("#0072B2", "#D55E00", "#000000")
_OTHERS = (
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7f7f7f",
    "#8c6d31",
    "#5e4fa2",
    "#66a61e",
    "#a50026",
    "#35978f",
)
_MARKERS = "svD^<>ph*PXd"
_OUR_FAMILY = "kvlathe"
_LEAST_KLD = 1e-7  # where a method that costs nothing is drawn
_STYLE: Any = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvlathe",
    "font.family": "sans-serif",
}


def require_matplotlib() -> None:
    """Find out before minutes of work whether plots can be drawn.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            "plots and reports need matplotlib; install it with: pip install 'kvlathe[plots]'"
        ) from error


@contextmanager
def styled() -> Iterator[None]:
    """The look that all plots share."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(width: float, height: float, n_panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side that share their y axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, n_panels, sharey=True, squeeze=False)
    return figure, list(panels[0])


def is_ours(family: str) -> bool:
    """Whether results of that family are of presets of ours and not of a baseline."""
    return family.startswith(_OUR_FAMILY)


def _families(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by family, each by rising bits; baselines first, so that ours are drawn on top."""
    families: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: is_ours(result.family)):
        families.setdefault(result.family, []).append(result)
    return {
        name: sorted(members, key=lambda member: member.size.bits_per_value)
        for name, members in families.items()
    }


def _styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Colour, marker and weight of every family, the same in all plots."""
    names = list(_families(results))
    ours = [name for name in names if is_ours(name)]
    styles: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(name for name in names if name not in ours):
        styles[name] = {
            "color": _OTHERS[at % len(_OTHERS)],
            "marker": _MARKERS[at % len(_MARKERS)],
            "linewidth": 1.2,
            "linestyle": "--",
            "markersize": 5.5,
            "zorder": 2,
        }
    for at, name in enumerate(ours):
        styles[name] = {
            "color": _OURS[at % len(_OURS)],
            "marker": "o",
            "linewidth": 2.6,
            "markersize": 7.5,
            "zorder": 3,
        }
    return styles


def kld_against_bits(results: Sequence[Result]) -> Figure:
    """Mean KLD (log) against bits a value, one line a family, 95 % intervals as bars.

    On the left of the coded part alone, which a long cache comes close to; on the right of the whole cache at the
    window's length, exact tokens included.
    """
    with styled():
        figure, panels = _figure(11.5, 5.2, n_panels=2)
        for axes, attribute in zip(panels, ("coded_bits", "bits_per_value"), strict=True):
            _draw_families(axes, results, attribute)
            axes.set(yscale="log")
        panels[0].set(
            xlabel="bits a value, coded part", ylabel="mean KL divergence from the exact cache, nats"
        )
        panels[1].set(xlabel=f"bits a value, whole cache at {results[0].setting.window:,} tokens")
        figure.suptitle("Quality against size: lower left is better")
        _legend(figure, panels[0])
        return figure


def _draw_families(axes: Axes, results: Sequence[Result], attribute: str) -> None:
    """One line a family; ``attribute`` of a result's size is its place on the x axis."""
    styles = _styles(results)
    for name, members in _families(results).items():
        bits = [getattr(member.size, attribute) for member in members]
        klds = [max(member.quality.kld, _LEAST_KLD) for member in members]
        bounds = [member.quality.kld_interval() for member in members]
        below = [max(0.0, kld - max(low, _LEAST_KLD)) for kld, (low, _) in zip(klds, bounds, strict=True)]
        above = [max(0.0, high - kld) for kld, (_, high) in zip(klds, bounds, strict=True)]
        axes.errorbar(bits, klds, yerr=[below, above], label=name, capsize=2, elinewidth=1, **styles[name])


def kld_by_position(results: Sequence[Result]) -> Figure:
    """Mean KLD (log) along the window, from where the first coded token can be read."""
    with styled():
        figure, (axes,) = _figure(9.5, 5.4)
        styles = _styles(results)
        setting = results[0].setting
        n_exact = setting.n_sinks + setting.tail
        for members in _families(results).values():
            for at, result in enumerate(members):
                size, klds = result.quality.position_bin, result.quality.kld_by_position
                # Before that, caches differ by rounding alone, which would stretch the scale.
                shown = [n for n in range(len(klds)) if n * size >= n_exact]
                style = {**styles[result.family], "marker": "", "alpha": 1 - 0.55 * at / len(members)}
                axes.plot(
                    [(n + 0.5) * size for n in shown],
                    [max(klds[n], _LEAST_KLD) for n in shown],
                    label=result.name,
                    **style,
                )
        axes.set(
            yscale="log",
            xlim=(0, setting.window),
            xlabel="position in the window, tokens",
            ylabel="mean KL divergence from the exact cache, nats",
            title="Does the damage grow with the context?",
        )
        _legend(figure, axes)
        return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the plot, ours first (they are drawn last)."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)


def bits_by_layer(results: Sequence[Result]) -> Figure:
    """Bits a value of the coded part by layer, keys above values, as a heat map of our methods.

    Without a method of ours, of all methods.
    """
    shown = [result for result in results if is_ours(result.family)] or list(results)
    with styled():
        n_layers = len(shown[0].size.key_bits)
        figure, (axes,) = _figure(max(6.0, 2.6 + 0.24 * n_layers), 1.6 + 0.62 * len(shown))
        rows = [bits for result in shown for bits in (result.size.key_bits, result.size.value_bits)]
        image = axes.imshow(rows, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        sides = [f"{result.name}  {side}" for result in shown for side in "KV"]
        axes.set_yticks(range(len(rows)), sides)
        axes.grid(False)
        for at in range(2, len(rows), 2):
            axes.axhline(at - 0.5, color="white", linewidth=2.5)
        axes.set(xlabel="layer", title="Where the bits go (coded part)")
        figure.colorbar(image, ax=axes, label="bits a value", pad=0.01)
        return figure


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element that can stand inside a page."""
    with styled():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


#: File name and function of every plot, in the order of reports.
PLOTS = {
    "kld-against-bits": kld_against_bits,
    "kld-by-position": kld_by_position,
    "bits-by-layer": bits_by_layer,
}
