"""Results of ``kvlathe eval`` and ``kvlathe needle``: gathered as they come, then drawn in a page and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .options import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = TypeVar("Line")

#: For the epilog of a command's help.
EXIT_STATUS = """\
Exit status: 0 when all that can run was measured; 1 when something is wrong; 2 for unusable arguments; 130 when
interrupted, and then the results so far are kept."""


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


def check_drawable(arguments: argparse.Namespace) -> None:
    """Refuse what could not be drawn in the end.

    Raises:
        EvaluationError: ``--report`` or ``--plots`` without matplotlib.
    """
    from ..lab.evaluation.plots import require_matplotlib

    if arguments.report is not None or arguments.plots is not None:
        require_matplotlib()


def gather(
    run: Callable[[Callable[[Line], None]], Iterable[Line]],
    path: Path,
    on_result: Callable[[Line, bool], None],
) -> list[Line]:
    """All results of a run, in its order.

    Args:
        run: yields results; what it is given takes each that was found in ``path``, just before that is yielded.
        path: where results are kept.
        on_result: takes each result as it comes, and whether it was found.

    Raises:
        KeyboardInterrupt: with a sentence on where the results so far are.
    """
    done: list[Line] = []
    found: list[Line] = []
    try:
        for result in run(found.append):
            done.append(result)
            on_result(result, bool(found) and found[-1] is result)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the results so far are in {path}, and the same command goes on from there"
        ) from None
    return done


def write_drawings(
    arguments: argparse.Namespace,
    results: Sequence[Line],
    skipped: Sequence[str],
    page: Callable[[Sequence[Line], Sequence[str]], str],
    plots: Mapping[str, Callable[[Sequence[Line]], Figure]],
) -> None:
    """Write the page to ``--report`` and the plots, by name, to ``--plots``, as far as they were asked for.

    Args:
        skipped: sentences on what did not run.

    Raises:
        EvaluationError: they cannot be written.
    """
    from ..errors import EvaluationError
    from ..lab.evaluation.plots import svg

    try:
        if arguments.report is not None:
            arguments.report.write_text(page(results, skipped), encoding="utf-8")
            say(f"Wrote {arguments.report}")
        if arguments.plots is not None:
            arguments.plots.mkdir(exist_ok=True)
            for name, draw in plots.items():
                (arguments.plots / f"{name}.svg").write_text(svg(draw(results)), encoding="utf-8")
            say(f"Wrote {', '.join(f'{name}.svg' for name in plots)} to {arguments.plots}")
    except OSError as error:
        raise EvaluationError(
            f"cannot write {error.filename}: {error.strerror}; the results themselves are in {arguments.output}"
        ) from error
