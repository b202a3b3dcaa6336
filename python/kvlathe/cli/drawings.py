"""Files that ``kvlathe eval`` and ``kvlathe needle`` write besides their results: pages and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .options import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_output_arguments(parser: argparse.ArgumentParser, output: Path, drawn: str) -> None:
    """``--output``, ``--report`` and ``--plots``; ``drawn`` is what the plots are called."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        default=output,
        help="results, JSON Lines; found again by a re-run (default %(default)s)",
    )
    group.add_argument(
        "--report", type=Path, metavar="FILE", help=f"write an HTML page with tables and {drawn}"
    )
    group.add_argument("--plots", type=Path, metavar="FOLDER", help=f"write the {drawn} as SVG files")


def unusable(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the files and the exact tokens asked for, before anything is loaded."""
    for option in ("output", "report", "plots"):
        path = getattr(arguments, option)
        if path is not None and not path.absolute().parent.is_dir():
            return f"--{option} {path}: there is no folder {path.parent}"
    if arguments.plots is not None and arguments.plots.is_file():
        return f"--plots {arguments.plots}: that is a file, expected a folder"
    if arguments.sinks < 0 or arguments.tail < 0:
        return f"--sinks {arguments.sinks} --tail {arguments.tail}: expected 0 or more"
    return None


def write_drawings(
    arguments: argparse.Namespace, page: Callable[[], str], plots: Mapping[str, Callable[[], Figure]]
) -> None:
    """Write the page to ``--report`` and the plots, by name, to ``--plots``, as far as they were asked for.

    Raises:
        EvaluationError: they cannot be written.
    """
    from ..errors import EvaluationError
    from ..evaluation.plots import svg

    try:
        if arguments.report is not None:
            arguments.report.write_text(page(), encoding="utf-8")
            say(f"Wrote {arguments.report}")
        if arguments.plots is not None:
            arguments.plots.mkdir(exist_ok=True)
            for name, draw in plots.items():
                (arguments.plots / f"{name}.svg").write_text(svg(draw()), encoding="utf-8")
            say(f"Wrote {', '.join(f'{name}.svg' for name in plots)} to {arguments.plots}")
    except OSError as error:
        raise EvaluationError(
            f"cannot write {error.filename}: {error.strerror}; the results themselves are in {arguments.output}"
        ) from error
