"""The command line, ``kvlathe COMMAND``, a module each. Without torch until it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .._moved import moved_name
from .._native import version
from .._requirements import check_transformers
from ..errors import KvlatheError
from .evaluate import add_eval_arguments, run_eval
from .needle import add_needle_arguments, run_needle
from .options import printable, say
from .prefix import add_prefix_arguments, run_prefix
from .show import add_show_arguments, run_show
from .tune import CURVE_HEADER, add_tune_arguments, format_point, run_tune
from .verify import add_verify_arguments, run_verify

__all__ = ["CURVE_HEADER", "build_parser", "format_point", "main", "run"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``kvlathe``."""
    parser = argparse.ArgumentParser(
        prog="kvlathe", description="Compressed key/value caches for transformers."
    )
    parser.add_argument("--version", action="version", version=f"kvlathe {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tune = commands.add_parser(
        "tune", help="calibrate a model and find the fewest bits within a quality budget"
    )
    add_tune_arguments(tune)
    tune.set_defaults(run=run_tune)
    verify = commands.add_parser("verify", help="hold a preset to its promise on your own text")
    add_verify_arguments(verify)
    verify.set_defaults(run=run_verify)
    show = commands.add_parser("show", help="say what a preset holds and what was measured of it")
    add_show_arguments(show)
    show.set_defaults(run=run_show, needs_transformers=False)
    prefix = commands.add_parser("prefix", help="look at a store of prefixes, check it, make it smaller")
    add_prefix_arguments(prefix)
    prefix.set_defaults(run=run_prefix, needs_transformers=False)
    evaluate = commands.add_parser(
        "eval", help="measure caches against the exact one, and against other methods"
    )
    add_eval_arguments(evaluate)
    evaluate.set_defaults(run=run_eval)
    needle = commands.add_parser(
        "needle", help="measure what a model still finds in a long text, by length and depth"
    )
    add_needle_arguments(needle)
    needle.set_defaults(run=run_needle)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command; errors become one sentence on stderr and exit status 1."""
    try:
        if getattr(arguments, "needs_transformers", True):
            check_transformers()
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `head` does. Nothing is left to be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (KvlatheError, ImportError) as error:
        say(f"error: {printable(str(error))}")
        return 1
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted; nothing was written")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``kvlathe``; without arguments it says what there is."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    return run(parser.parse_args(argv))


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
