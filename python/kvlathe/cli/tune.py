"""``kvlathe tune``: calibrate a model and find the fewest bits within a quality budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..preset import Preset
from .loading import model_and_text
from .options import (
    add_model_argument,
    add_run_arguments,
    add_seed_argument,
    add_text_argument,
    count,
    positive,
    say,
)

if TYPE_CHECKING:
    from ..calibration.tuning import CurvePoint, TuneOptions

_TUNE_EPILOG = """\
examples:
  %(prog)s --model smollm2 --target-ppl-delta 0.01 --output smollm2.safetensors
  %(prog)s --model ./Qwen2.5-7B --text corpus/ --target-kld 0.002 --output qwen.json

Exit status: 0 when a preset was written; 1 when the budget cannot be met or something is wrong, and then nothing
is written; 2 for unusable arguments."""


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe tune``, which `scripts/auto_tune_kv_compression.py` shares."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Calibrate a model's key/value cache and find the fewest bits that stay within a quality budget."
    )
    parser.epilog = _TUNE_EPILOG
    add_model_argument(parser)
    parser.add_argument(
        "--output", required=True, type=Path, help="preset to write: .safetensors (small, fast) or .json"
    )
    budget = parser.add_argument_group("quality budget (both must hold if both are given)")
    budget.add_argument(
        "--target-ppl-delta",
        type=positive,
        help="largest rise of perplexity on held-out text as a fraction: 0.05 = +5 %% "
        "(the default without --target-kld)",
    )
    budget.add_argument(
        "--target-kld", type=positive, help="largest mean KL divergence from the exact cache, in nats"
    )
    budget.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="one-sided confidence with which it must hold (default %(default)s)",
    )
    text = parser.add_argument_group("text")
    add_text_argument(text, "; one part calibrates, one guides the search, one verifies")
    text.add_argument("--window", type=count, default=1024, help="tokens of a window (default %(default)s)")
    text.add_argument("--calibration-windows", type=count, default=32, help="default %(default)s")
    text.add_argument(
        "--sampled-windows",
        type=int,
        default=0,
        help="how many of these the model writes itself, for want of text (default %(default)s)",
    )
    text.add_argument("--evaluation-windows", type=count, default=12, help="default %(default)s")
    text.add_argument("--verification-windows", type=count, default=12, help="default %(default)s")
    add_seed_argument(text)
    parser.add_argument(
        "--calibrated",
        type=Path,
        metavar="PRESET",
        help="take over this preset's calibration instead of making one: only the rate is searched",
    )
    codec = parser.add_argument_group("codec")
    codec.add_argument(
        "--block-len",
        type=int,
        default=64,
        choices=(8, 16, 32, 64, 128, 256),
        help="tokens of a packed block (default %(default)s)",
    )
    codec.add_argument(
        "--keep-recent",
        type=int,
        default=128,
        help="latest tokens that the cache will keep exact (default %(default)s)",
    )
    codec.add_argument(
        "--no-gradients",
        action="store_true",
        help="use E[q qT] and the output projection instead of gradients: faster, less exact",
    )
    add_run_arguments(parser)


def _tune_options(arguments: argparse.Namespace) -> TuneOptions:
    from ..calibration.basis import CalibrationOptions
    from ..calibration.tuning import TuneOptions

    ppl_delta = arguments.target_ppl_delta
    if ppl_delta is None and arguments.target_kld is None:
        ppl_delta = 0.05
    return TuneOptions(
        target_ppl_delta=ppl_delta,
        target_kld=arguments.target_kld,
        window=arguments.window,
        calibration_windows=arguments.calibration_windows,
        sampled_windows=arguments.sampled_windows,
        evaluation_windows=arguments.evaluation_windows,
        verification_windows=arguments.verification_windows,
        confidence=arguments.confidence,
        calibration=CalibrationOptions(
            block_len=arguments.block_len,
            tail=arguments.keep_recent,
            gradients=not arguments.no_gradients,
            seed=arguments.seed,
        ),
    )


def format_point(point: CurvePoint) -> str:
    """One line of the curve."""
    quality = point.quality
    return (
        f"{point.bits_per_value:5.2f}  {100 * quality.ppl_delta:+8.3f} %  {100 * point.ppl_delta_bound:+8.3f} %  "
        f"{quality.kld:9.5f}  {point.kld_bound:9.5f}  {100 * quality.top1:7.2f} %  {'yes' if point.within else 'no'}"
    )


CURVE_HEADER = " bits    perplexity       bound        KLD      bound      top-1   within budget"


def run_tune(arguments: argparse.Namespace) -> int:
    """``kvlathe tune``."""
    if arguments.output.suffix not in (".json", ".safetensors"):
        say(f"--output {arguments.output}: the name must end in .safetensors or .json")
        return 2
    if not arguments.output.parent.is_dir():
        say(f"--output {arguments.output}: there is no folder {arguments.output.parent}")
        return 2
    from ..calibration.tuning import describe_budget, tune

    options = _tune_options(arguments)
    calibrated = Preset.load(arguments.calibrated) if arguments.calibrated else None
    loaded, corpus = model_and_text(arguments)
    say(f"{loaded.name}: tuning for {describe_budget(options)} on {corpus.name}")
    say(CURVE_HEADER)
    result = tune(
        loaded.model,
        loaded.tokenizer,
        corpus,
        options,
        name=loaded.name,
        calibrated=calibrated,
        on_note=lambda note: say(f"note: {note}"),
        on_point=lambda point: say(format_point(point)),
    )
    result.preset.save(arguments.output)
    print(f"The curve, by rate:\n{CURVE_HEADER}")
    for point in result.curve:
        print(format_point(point) + ("   <- chosen" if point is result.best else ""))
    print(f"Verified on text that the search did not see:\n{format_point(result.verified)}")
    size_mb = arguments.output.stat().st_size / 2**20
    print(
        f"Wrote {arguments.output} ({size_mb:.1f} MB): {result.preset.bits_per_value:.2f} bits a value, "
        f"{16 / result.preset.bits_per_value:.1f} times smaller than 16 bits."
    )
    return 0
