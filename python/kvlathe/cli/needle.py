"""``kvlathe needle``: what a model still finds in a long text when its cache is compressed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import model_and_text, probed
from .methods import BASELINES_LISTED, Chosen, add_method_arguments, add_protocol_arguments, chosen_methods
from .options import add_model_argument, add_run_arguments, add_seed_argument, add_text_argument, count, say
from .results import EXIT_STATUS, add_output_arguments, check_drawable, gather, unusable, write_drawings

if TYPE_CHECKING:
    from ..calibration.rope_probe import ModelShape
    from ..calibration.text.corpus import Corpus
    from ..lab.retrieval import Haystack, Holder, NeedleKind, Prompt, Trial

_CALIBRATION_WINDOW = 1024
_LENGTHS = (1024, 2048, 4096, 8192)
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_EPILOG = f"""\
needles:
  number     The special magic number of Lisbon is 48213.
  fact       The secret password of Clara is amber falcon.
  sentence   The note of Jonas says: The green otter repaired a silver ladder behind the old station.

examples:
  %(prog)s --model smollm2
      the exact cache and the preset that comes with kvlathe, up to 8,192 tokens
  %(prog)s --model smollm2 --lengths 1024 2048 --baselines q8_0 kivi-2 --plots plots/
      two lengths, two other methods, and the grids
  %(prog)s --model ./Qwen2.5-7B --preset qwen.safetensors --bits 2.125 3.125 --text articles/ \\
      --lengths 8192 32768 --needles 4 --report needle.html

{BASELINES_LISTED}

Results are written to --output as they come. The same command again runs only what is missing there; with more
lengths, depths, needles or methods it runs only those that are new.

{EXIT_STATUS}"""


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe needle``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Hide a needle in a long text, ask the model for it, and say how often it is found with the exact cache and "
        "with\ncompressed ones, by the text's length and the needle's depth."
    )
    parser.epilog = _EPILOG
    add_model_argument(parser)
    add_method_arguments(parser.add_argument_group("caches to compare with the exact one"))
    needles = parser.add_argument_group("needles and text")
    needles.add_argument(
        "--lengths",
        nargs="+",
        type=count,
        metavar="N",
        help=f"tokens of a prompt, its answer included (default: {' '.join(map(str, _LENGTHS))}, "
        "as far as the model reads)",
    )
    needles.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=list(_DEPTHS),
        metavar="D",
        help=f"where the needle is, 0 the text's beginning, 1 its end (default: {' '.join(f'{d:g}' for d in _DEPTHS)})",
    )
    needles.add_argument(
        "--needles",
        type=count,
        default=2,
        help="of each kind at each length and depth (default %(default)s)",
    )
    needles.add_argument("--kinds", nargs="+", metavar="KIND", help="from the list below (default: all)")
    add_text_argument(
        needles,
        " to hide them in, split as kvlathe tune splits them: the part that it does not calibrate on",
    )
    add_protocol_arguments(
        needles,
        calibrated_on=f"of {_CALIBRATION_WINDOW:,} tokens of the other part of the text",
        sinks="that baselines keep exact; ours keep what their preset says",
    )
    add_seed_argument(needles, "needles and pieces of text")
    add_output_arguments(parser, Path("kvlathe-needle.jsonl"), "grids")
    add_run_arguments(parser)


def _unusable(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments by themselves, before anything is loaded."""
    if not all(0 <= depth <= 1 for depth in arguments.depths):
        return f"--depths {' '.join(f'{depth:g}' for depth in arguments.depths)}: expected shares from 0 to 1"
    return unusable(arguments)


def _lengths(arguments: argparse.Namespace, config: Any) -> list[int]:
    """The lengths asked for, or those of the usual ones that the model reads.

    Raises:
        EvaluationError: a length beyond what the model reads.
    """
    from ..calibration.text.window_length import most_positions
    from ..errors import EvaluationError

    limit = most_positions(config)
    if limit is None:
        limit = max([*(arguments.lengths or []), *_LENGTHS])
    if arguments.lengths is None:
        lengths = [length for length in _LENGTHS if length <= limit]
        if left_out := len(_LENGTHS) - len(lengths):
            say(f"note: the model reads at most {limit} tokens; {left_out} of the usual lengths are left out")
        return lengths or [limit]
    if too_long := [length for length in arguments.lengths if length > limit]:
        raise EvaluationError(
            f"--lengths {' '.join(map(str, too_long))}: the model reads at most {limit} tokens"
        )
    return list(arguments.lengths)


def _prompts(arguments: argparse.Namespace, config: Any, tokenizer: Any, corpus: Corpus) -> list[Prompt]:
    from ..lab.retrieval import KINDS, Haystack, make_prompts
    from ..lab.retrieval.needle import kinds_named

    kinds: list[NeedleKind] = kinds_named(arguments.kinds or list(KINDS))
    lengths = _lengths(arguments, config)
    haystack: Haystack = Haystack.from_documents(tokenizer, corpus.held_out, max(lengths))
    return make_prompts(
        tokenizer,
        haystack,
        kinds=kinds,
        lengths=lengths,
        depths=arguments.depths,
        n_needles=arguments.needles,
        seed=arguments.seed,
    )


def _holders(arguments: argparse.Namespace, chosen: Chosen, shape: ModelShape) -> list[Holder]:
    """The exact cache and all that is compared with it."""
    from ..lab.retrieval import CodedHolder, ExactHolder, PresetHolder

    n_sinks, tail = arguments.sinks, arguments.tail
    return [
        ExactHolder(),
        *(PresetHolder(preset, shape, tail, label) for label, preset in chosen.presets),
        *(CodedHolder(baseline, shape, n_sinks, tail) for baseline in chosen.baselines),
    ]


def run_needle(arguments: argparse.Namespace) -> int:
    """``kvlathe needle``."""
    if wrong := _unusable(arguments):
        say(wrong)
        return 2
    from ..lab.retrieval import Trials, search
    from ..lab.retrieval.plots import PLOTS
    from ..lab.retrieval.report import html_report
    from ..lab.retrieval.run import check_lengths, make_setting
    from ..lab.retrieval.table import markdown, rows_by_kind, rows_by_length

    check_drawable(arguments)
    trials = Trials(arguments.output)
    loaded, corpus = model_and_text(arguments)
    prompts = _prompts(arguments, loaded.model.config, loaded.tokenizer, corpus)
    setting = make_setting(
        loaded.model,
        model_name=loaded.name,
        text_name=corpus.name,
        n_sinks=arguments.sinks,
        tail=arguments.tail,
    )
    check_lengths(prompts, setting)
    probe = probed(loaded.model)
    chosen = chosen_methods(
        arguments, loaded, corpus, probe, n_sinks=arguments.sinks, window=_CALIBRATION_WINDOW
    )
    holders = _holders(arguments, chosen, probe.shape)
    say(
        f"{loaded.name}: {len(prompts)} needles in {corpus.name}, {len(holders)} caches; each keeps the latest "
        f"{setting.tail} tokens exact"
    )
    n_kept = 0

    def on_trial(trial: Trial, kept: bool) -> None:
        nonlocal n_kept
        if kept:
            n_kept += 1
        else:
            say(format_trial(trial))

    done = gather(
        lambda on_kept: search(loaded.model, prompts, holders, setting, trials, on_kept=on_kept),
        trials.path,
        on_trial,
    )
    if n_kept:
        say(f"{n_kept} of {len(done)} results were kept from {trials.path}")
    print(markdown(rows_by_length(done)))
    print(f"\nBy kind of needle:\n\n{markdown(rows_by_kind(done))}")
    print(
        "\nFound: greedy decoding gives the answer. Log-prob: of the answer, nats a token. "
        f"Results are in {trials.path}."
    )
    write_drawings(arguments, done, chosen.skipped, html_report, PLOTS)
    return 0


def format_trial(trial: Trial) -> str:
    """One line for the person who waits."""
    return (
        f"{trial.length:>7,} tokens  depth {trial.depth:4.0%}  {trial.kind:<8}  {trial.name:>24}  "
        f"{'found ' if trial.found else 'missed'}  log-prob {trial.log_prob_per_token:8.3f}  {trial.seconds:5.1f} s"
    )
