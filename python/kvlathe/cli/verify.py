"""``kvlathe verify``: hold a preset to its promise on the user's own text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..preset import Preset
from .loading import model_and_text
from .options import add_model_argument, add_run_arguments, add_seed_argument, count, positive, say

if TYPE_CHECKING:
    from ..calibration.verification import Verdict

_EPILOG = """\
examples:
  %(prog)s smollm2.safetensors --model smollm2 --text my-documents/
  %(prog)s qwen.safetensors --model ./Qwen2.5-7B --text notes.txt --target-kld 0.002

Exit status: 0 when the promise holds; 1 when it does not, or something is wrong; 2 for unusable arguments."""


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe verify``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Measure a preset's quality on text that its calibration and tuning have not seen, and say whether it "
        "keeps its promise."
    )
    parser.epilog = _EPILOG
    parser.add_argument("preset", type=Path, help="a tuned .safetensors or .json preset")
    add_model_argument(parser)
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, help="text files or folders of your own"
    )
    promise = parser.add_argument_group("promise (default: what the preset was tuned for)")
    promise.add_argument(
        "--target-ppl-delta",
        type=positive,
        help="largest rise of perplexity as a fraction: 0.05 = +5 %%",
    )
    promise.add_argument("--target-kld", type=positive, help="largest mean KL divergence, in nats")
    promise.add_argument(
        "--confidence", type=float, default=0.95, help="one-sided, of the bounds (default %(default)s)"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--window", type=count, default=1024, help="tokens of a window (default %(default)s)")
    text.add_argument("--windows", type=count, default=16, help="default %(default)s")
    add_seed_argument(text)
    add_run_arguments(parser)


def run_verify(arguments: argparse.Namespace) -> int:
    """``kvlathe verify``."""
    from ..calibration.verification import verify

    preset = Preset.load(arguments.preset)
    loaded, corpus = model_and_text(arguments)
    say(f"{loaded.name}: verifying {preset.bits_per_value:.2f} bits a value on {corpus.name}")
    verdict = verify(
        loaded.model,
        loaded.tokenizer,
        [*corpus.calibration, *corpus.held_out],
        preset,
        target_ppl_delta=arguments.target_ppl_delta,
        target_kld=arguments.target_kld,
        window=arguments.window,
        n_windows=arguments.windows,
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    print(format_verdict(verdict))
    return 0 if verdict.holds else 1


def format_verdict(verdict: Verdict) -> str:
    """The measurement beside the promise, and the conclusion."""
    point, quality = verdict.point, verdict.point.quality
    rows = [
        (
            "perplexity",
            f"{100 * quality.ppl_delta:+.3f} %",
            f"{100 * point.ppl_delta_bound:+.3f} %",
            None if verdict.target_ppl_delta is None else f"{100 * verdict.target_ppl_delta:+g} %",
        ),
        (
            "KLD, nats",
            f"{quality.kld:.5f}",
            f"{point.kld_bound:.5f}",
            None if verdict.target_kld is None else f"{verdict.target_kld:g}",
        ),
    ]
    bound = f"at most ({verdict.confidence:.0%})"
    lines = [f"{'':12}{'measured':>12}{bound:>18}{'promised':>12}"]
    lines += [
        f"{name:12}{mean:>12}{most:>18}{promise or 'nothing':>12}" for name, mean, most, promise in rows
    ]
    lines.append(f"top-1 agreement {100 * quality.top1:.2f} %, {quality.n_positions} positions")
    lines.append(
        "The promise holds."
        if verdict.holds
        else "The promise does NOT hold on this text. Tune on text like it (kvlathe tune --text ...), raise the "
        "budget, or verify on more windows if only the bounds are above it."
    )
    return "\n".join(lines)
