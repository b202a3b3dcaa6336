#!/usr/bin/env python3
"""What docs/quality.md shows of a model: the promise verified, the table of caches, needles, and their plots.

    python scripts/measure_quality.py quality-smollm2/ --model smollm2 --text articles.txt --judge other-articles.txt
    python scripts/measure_quality.py quality-qwen/ --model Qwen/Qwen2.5-Coder-0.5B-Instruct --text articles.txt \\
        --judge other-articles.txt --lengths 4096 8192 16384 32768 --depths 0 0.5 1 --kinds number

A preset is tuned on --text; the promise is verified, and every cache judged, on --judge, which neither calibration nor
search sees. (Calibrated baselines calibrate on a part of --judge that does not judge, which favours them.) Everything
lies in one folder: preset.safetensors (made unless it is there), eval.jsonl and needle.jsonl, plots/, and quality.md
with the tables, the machine, versions and seeds. The same command goes on where an earlier one stopped. On two cores:
about an hour and a half for SmolLM2, several for Qwen2.5-0.5B.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch

from kvlathe.cli import main as kvlathe

_RATES = ("1.5", "2", "2.25", "3", "3.25", "4.25", "5.25")
_NEEDLE_RATES = ("2.25", "3.25", "4.25")
_NEEDLE_BASELINES = ("q8_0", "q4_0-hadamard", "kivi-4", "kivi-2", "turboquant-4", "turboquant-2")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--model", required=True, help="hub name, model folder, .gguf file, or 'smollm2'")
    parser.add_argument("--text", required=True, nargs="+", help="text files or folders to tune on")
    parser.add_argument("--judge", required=True, nargs="+", help="text files or folders to judge on")
    parser.add_argument("--target-ppl-delta", default="0.01", help="budget to tune for (default %(default)s)")
    parser.add_argument("--target-kld", default="0.002", help="budget to tune for (default %(default)s)")
    parser.add_argument("--beside", nargs="+", default=[], help="presets for the table beside the tuned one")
    parser.add_argument("--calibration-windows", default="24", help="of a new preset (default %(default)s)")
    parser.add_argument("--windows", default="16", help="that judge, of 1,024 tokens (default %(default)s)")
    parser.add_argument("--bits", nargs="+", default=_RATES, help=f"default {' '.join(_RATES)}")
    parser.add_argument("--baselines", nargs="+", default=["all"], help="of the table (default all)")
    needles = parser.add_argument_group("needles")
    needles.add_argument(
        "--haystack", nargs="+", help="text files or folders that hide them (default: --judge)"
    )
    needles.add_argument("--lengths", nargs="+", default=["1024", "2048", "4096", "8192"])
    needles.add_argument("--depths", nargs="+", default=["0", "0.25", "0.5", "0.75", "1"])
    needles.add_argument("--needles", default="1", help="of each kind in a cell (default %(default)s)")
    needles.add_argument("--kinds", nargs="+", default=["number", "fact"])
    needles.add_argument("--needle-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", default="0")
    return parser.parse_args()


def machine() -> str:
    """The processor, threads and versions, as a sentence."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvlathe", "torch", "transformers"))
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {versions}"
    )


def run(*command: str | Path, accepted: tuple[int, ...] = (0,)) -> str:
    """What a command prints, after its progress has gone to stderr.

    Raises:
        SystemExit: its exit status is not one of ``accepted``.
    """
    printed = io.StringIO()
    words = [str(word) for word in command]
    print("$ kvlathe " + " ".join(words), file=sys.stderr)
    start = time.perf_counter()
    with redirect_stdout(printed):
        status = kvlathe(words)
    if status not in accepted or not printed.getvalue():
        raise SystemExit(status or 1)
    seconds = time.perf_counter() - start
    return (
        f"```text\nkvlathe {' '.join(words)}\n```\n\n{printed.getvalue().strip()}\n\n{seconds:.0f} seconds.\n"
    )


class Page:
    """The report, written as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: list[str] = []

    def add(self, part: str) -> None:
        self._parts.append(part)
        self.path.write_text("\n".join(self._parts), encoding="utf-8")


def main() -> int:
    asked = arguments()
    if set(asked.text) & set(asked.judge):
        raise SystemExit("--text and --judge name the same file: what judges must not have been seen")
    asked.folder.mkdir(parents=True, exist_ok=True)
    model = ("--model", asked.model)
    seed = ("--seed", asked.seed)
    judge = ("--text", *asked.judge, *seed)
    page = Page(asked.folder / "quality.md")
    page.add(f"# Quality of {asked.model}\n\n{machine()}; seed {asked.seed}.\n")

    preset, tuned = asked.folder / "preset.safetensors", asked.folder / "tune.md"
    if not preset.exists():
        budget = ("--target-ppl-delta", asked.target_ppl_delta, "--target-kld", asked.target_kld)
        windows = ("--calibration-windows", asked.calibration_windows)
        made = run("tune", *model, "--text", *asked.text, *seed, *budget, *windows, "--output", preset)
        tuned.write_text(made, encoding="utf-8")
    if tuned.exists():
        page.add(tuned.read_text(encoding="utf-8"))
    page.add(run("verify", preset, *model, *judge, accepted=(0, 1)))  # 1: the promise does not hold

    output = ("--output", asked.folder / "eval.jsonl", "--plots", asked.folder / "plots")
    rates = ("--bits", *asked.bits, "--windows", asked.windows, "--baselines", *asked.baselines)
    page.add(run("eval", *model, *judge, "--preset", preset, *asked.beside, *rates, *output))

    output = ("--output", asked.folder / "needle.jsonl", "--plots", asked.folder / "plots")
    caches = ("--bits", *_NEEDLE_RATES, "--baselines", *_NEEDLE_BASELINES, "--dtype", asked.needle_dtype)
    cells = ("--lengths", *asked.lengths, "--depths", *asked.depths, "--needles", asked.needles)
    haystack = ("--text", *(asked.haystack or asked.judge), *seed)
    kinds = ("--kinds", *asked.kinds)
    page.add(run("needle", *model, *haystack, "--preset", preset, *caches, *cells, *kinds, *output))
    print(f"Wrote {page.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
