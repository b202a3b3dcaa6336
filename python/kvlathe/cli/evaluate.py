"""``kvlathe eval``: caches against the exact one, ours and other methods on the same tokens."""

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
from .options import add_model_argument, add_run_arguments, add_seed_argument, count, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..corpus import Corpus
    from ..evaluation import Method, Result

_EPILOG = f"""\
examples:
  %(prog)s --model smollm2
      the preset that comes with kvlathe, on this Python's documentation
  %(prog)s --model smollm2 --text wikitext.txt --baselines all --report report.html
      and everybody else's methods, with plots, in one page
  %(prog)s --model ./Qwen2.5-7B --preset qwen.safetensors --bits 2.125 3.125 --window 8192
      one calibration at two rates, in long windows

{BASELINES_LISTED}

Results are written to --output as they come. The same command again measures only what is missing there.

Exit status: 0 when all that can run was measured; 1 when something is wrong; 2 for unusable arguments; 130 when
interrupted, and then the results so far are kept."""


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe eval``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Run a model with the exact cache and with compressed ones on the same text, and say what each costs: bits a "
        "value with all\noverhead, KL divergence, perplexity, top-1 agreement, with 95 % bootstrap intervals."
    )
    parser.epilog = _EPILOG
    add_model_argument(parser)
    what = parser.add_argument_group("what to measure")
    add_method_arguments(what)
    text = parser.add_argument_group("text and protocol")
    text.add_argument(
        "--text",
        nargs="+",
        type=Path,
        help="text files or folders, split as kvlathe tune splits them: the part that it does not calibrate on judges, "
        "one file as running text (default: this Python's documentation and sources)",
    )
    text.add_argument(
        "--window",
        type=count,
        default=1024,
        help="tokens of a window, say 1024 to 8192 (default %(default)s)",
    )
    text.add_argument("--windows", type=count, default=4, help="how many (default %(default)s)")
    text.add_argument(
        "--calibration-windows",
        type=count,
        default=8,
        help="for baselines that are calibrated, from the other part of the text (default %(default)s)",
    )
    text.add_argument(
        "--mode",
        choices=("streaming", "all-coded"),
        default="streaming",
        help="streaming: sinks and tail are read exactly; all-coded: every token is read coded, the first ones "
        "and a query's own included, but for an incomplete last group (default %(default)s)",
    )
    text.add_argument("--sinks", type=int, default=4, help="first tokens, exact (default %(default)s)")
    text.add_argument("--tail", type=int, default=128, help="latest tokens, exact (default %(default)s)")
    add_seed_argument(text)
    add_output_arguments(parser, Path("kvlathe-eval.jsonl"), "plots")
    add_run_arguments(parser)


def _windows(arguments: argparse.Namespace, corpus: Corpus, tokenizer: Any) -> list[Tensor]:
    """The windows that judge."""
    from ..token_windows import windows

    # One file is running text, as perplexities are usually stated; of many documents each gives a window in turn.
    one_file = arguments.text is not None and len(arguments.text) == 1 and arguments.text[0].is_file()
    seed = None if one_file else arguments.seed
    return windows(tokenizer, corpus.held_out, arguments.window, arguments.windows, seed)


def _draw(results: Sequence[Result], skipped: Sequence[str], arguments: argparse.Namespace) -> None:
    """The report and the plots that were asked for."""
    from ..evaluation.plots import PLOTS
    from ..evaluation.report import html_report

    plots = {name: partial(draw, results) for name, draw in PLOTS.items()}
    write_drawings(arguments, lambda: html_report(results, skipped), plots)


def run_eval(arguments: argparse.Namespace) -> int:
    """``kvlathe eval``."""
    if wrong := unusable(arguments):
        say(wrong)
        return 2
    from ..baselines import Subject
    from ..errors import EvaluationError
    from ..evaluation import PresetMethod, Results, evaluate
    from ..evaluation.plots import require_matplotlib
    from ..evaluation.report import describe_mode
    from ..evaluation.run import make_setting
    from ..evaluation.table import markdown
    from ..token_windows import windows
    from ..window_length import check_model_reads

    if arguments.report is not None or arguments.plots is not None:
        require_matplotlib()
    results = Results(arguments.output)
    loaded, corpus = model_and_text(arguments)
    model, tokenizer = loaded.model, loaded.tokenizer
    check_model_reads(model.config, arguments.window)
    judged = _windows(arguments, corpus, tokenizer)
    setting = make_setting(
        model,
        judged,
        model_name=loaded.name,
        text_name=corpus.name,
        mode=arguments.mode,
        n_sinks=arguments.sinks,
        tail=arguments.tail,
    )
    probe = probed(model)
    subject = Subject(
        model,
        probe,
        setting.n_sinks,
        lambda: windows(
            tokenizer,
            corpus.calibration,
            arguments.window,
            arguments.calibration_windows,
            arguments.seed,
        ),
    )
    named = baseline_names(arguments)
    methods: list[Method] = [
        PresetMethod(preset, probe.shape, label) for label, preset in chosen_presets(arguments, model.config)
    ]
    baselines, skipped = chosen_baselines(named, subject)
    methods += baselines
    if not methods:
        raise EvaluationError(f"nothing to measure: {'; '.join(skipped)}")
    say(
        f"{loaded.name}: {len(judged)} windows of {arguments.window} tokens of {corpus.name}; {describe_mode(setting)}"
    )
    done: list[Result] = []
    kept: set[str] = set()
    try:
        for result in evaluate(
            model,
            judged,
            methods,
            setting,
            probe.shape,
            results,
            on_kept=lambda result: kept.add(result.name),
        ):
            done.append(result)
            say(format_result(result) + (f"  (kept from {results.path})" if result.name in kept else ""))
    except KeyboardInterrupt:
        say(f"interrupted; the results so far are in {results.path}, and the same command goes on from there")
        return 130
    print(markdown(done))
    print(
        f"\nThe exact cache's perplexity is {done[0].quality.exact_perplexity:.4f}. KLD in nats; bits count the whole "
        f"cache at {setting.window} tokens. Results are in {results.path}."
    )
    _draw(done, skipped, arguments)
    return 0


def format_result(result: Result) -> str:
    """One line for the person who waits."""
    quality = result.quality
    return (
        f"{result.name:>24}  {result.size.bits_per_value:6.2f} bits  KLD {quality.kld:9.6f}  "
        f"perplexity {100 * quality.ppl_delta:+9.3f} %  top-1 {100 * quality.top1:6.2f} %  {result.seconds:4.0f} s"
    )
