"""The seed's command line for calibration, `scripts/auto_tune_kv_compression.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..cli import run
from ..cli.tune import add_tune_arguments, run_tune


def tune_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the seed's script: the arguments of ``kvlathe tune`` without the word."""
    parser = argparse.ArgumentParser()
    add_tune_arguments(parser)
    parser.set_defaults(run=run_tune)
    return run(parser.parse_args(argv))
