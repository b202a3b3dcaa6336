"""``kvlathe needle``: what a model still finds in a long text when its cache is compressed."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawings import add_output_arguments, unusable, write_drawings
from .loading import model_and_text, probed
from .methods import (
    BASELINES_LISTED,
    add_method_arguments,
    baseline_names,
    chosen_baselines,
    chosen_presets,
)
from .options import add_model_argument, add_run_arguments, count, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..corpus import Corpus
    from ..retrieval import Haystack, Holder, NeedleKind, Prompt, Trial
    from ..rope_probe import ProbeResult

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

Exit status: 0 when all that can run was run; 1 when something is wrong; 2 for unusable arguments; 130 when
interrupted, and then the results so far are kept."""


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
    needles.add_argument(
        "--text",
        nargs="+",
        type=Path,
        help="text files or folders to hide them in, split as kvlathe tune splits them: the part that it does not "
        "calibrate on (default: this Python's documentation and sources)",
    )
    needles.add_argument(
        "--calibration-windows",
        type=count,
        default=8,
        help="for baselines that are calibrated, of 1,024 tokens of the other part of the text (default %(default)s)",
    )
    needles.add_argument(
        "--sinks",
        type=int,
        default=4,
        help="first tokens that baselines keep exact; ours keep what their preset says (default %(default)s)",
    )
    needles.add_argument("--tail", type=int, default=128, help="latest tokens, exact (default %(default)s)")
    needles.add_argument(
        "--seed", type=int, default=0, help="chooses needles and pieces of text (default %(default)s)"
    )
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
    from ..errors import EvaluationError
    from ..window_length import most_positions

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


def _holders(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, corpus: Corpus, probe: ProbeResult
) -> tuple[list[Holder], list[str]]:
    """The exact cache and all that is compared with it, and sentences on what does not run."""
    from ..baselines import Subject
    from ..retrieval import CodedHolder, ExactHolder, PresetHolder
    from ..token_windows import windows

    named = baseline_names(arguments)
    holders: list[Holder] = [ExactHolder()]
    for label, preset in chosen_presets(arguments, model.config):
        holders.append(PresetHolder(preset, probe.shape, arguments.tail, label))
    subject = Subject(
        model,
        probe,
        arguments.sinks,
        lambda: windows(tokenizer, corpus.calibration, 1024, arguments.calibration_windows, arguments.seed),
    )
    baselines, skipped = chosen_baselines(named, subject)
    for baseline in baselines:
        holders.append(CodedHolder(baseline, probe.shape, arguments.sinks, arguments.tail))
    return holders, skipped


def _prompts(arguments: argparse.Namespace, config: Any, tokenizer: Any, corpus: Corpus) -> list[Prompt]:
    from ..retrieval import KINDS, Haystack, make_prompts
    from ..retrieval.needle import kinds_named

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


def _draw(trials: Sequence[Trial], skipped: Sequence[str], arguments: argparse.Namespace) -> None:
    """The report and the grids that were asked for."""
    from ..retrieval.plots import PLOTS
    from ..retrieval.report import html_report

    plots = {name: partial(draw, trials) for name, draw in PLOTS.items()}
    write_drawings(arguments, lambda: html_report(trials, skipped), plots)


def run_needle(arguments: argparse.Namespace) -> int:
    """``kvlathe needle``."""
    if wrong := _unusable(arguments):
        say(wrong)
        return 2
    from ..evaluation.plots import require_matplotlib
    from ..retrieval import Trials, search
    from ..retrieval.run import check_lengths, make_setting
    from ..retrieval.table import markdown, rows_by_kind, rows_by_length

    if arguments.report is not None or arguments.plots is not None:
        require_matplotlib()
    trials = Trials(arguments.output)
    loaded, corpus = model_and_text(arguments)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = _prompts(arguments, model.config, tokenizer, corpus)
    setting = make_setting(
        model, model_name=loaded.name, text_name=corpus.name, n_sinks=arguments.sinks, tail=arguments.tail
    )
    check_lengths(prompts, setting)
    probe = probed(model)
    holders, skipped = _holders(arguments, model, tokenizer, corpus, probe)
    say(
        f"{loaded.name}: {len(prompts)} needles in {corpus.name}, {len(holders)} caches; each keeps the latest "
        f"{setting.tail} tokens exact"
    )
    done: list[Trial] = []
    kept: list[str] = []
    try:
        for trial in search(
            model, prompts, holders, setting, trials, on_kept=lambda trial: kept.append(trial.key)
        ):
            done.append(trial)
            if trial.key not in kept[-1:]:
                say(format_trial(trial))
    except KeyboardInterrupt:
        say(f"interrupted; the results so far are in {trials.path}, and the same command goes on from there")
        return 130
    if kept:
        say(f"{len(kept)} of {len(done)} results were kept from {trials.path}")
    print(markdown(rows_by_length(done)))
    print(f"\nBy kind of needle:\n\n{markdown(rows_by_kind(done))}")
    print(
        "\nFound: greedy decoding gives the answer. Log-prob: of the answer, nats a token. "
        f"Results are in {trials.path}."
    )
    _draw(done, skipped, arguments)
    return 0


def format_trial(trial: Trial) -> str:
    """One line for the person who waits."""
    return (
        f"{trial.length:>7,} tokens  depth {trial.depth:4.0%}  {trial.kind:<8}  {trial.name:>24}  "
        f"{'found ' if trial.found else 'missed'}  log-prob {trial.log_prob_per_token:8.3f}  {trial.seconds:5.1f} s"
    )
