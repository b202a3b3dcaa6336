"""``kvlathe eval``: caches against the exact one, ours and other methods on the same tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import model_and_text, probed
from .methods import BASELINES_LISTED, add_method_arguments, add_protocol_arguments, chosen_methods
from .options import add_model_argument, add_run_arguments, add_seed_argument, add_text_argument, count, say
from .results import EXIT_STATUS, add_output_arguments, check_drawable, gather, unusable, write_drawings

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.text.corpus import Corpus
    from ..lab.evaluation import Method, Result

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

{EXIT_STATUS}"""


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
    add_text_argument(
        text,
        ", split as kvlathe tune splits them: the part that it does not calibrate on judges, one file as running text",
    )
    text.add_argument(
        "--window",
        type=count,
        default=1024,
        help="tokens of a window, say 1024 to 8192 (default %(default)s)",
    )
    text.add_argument("--windows", type=count, default=4, help="how many (default %(default)s)")
    text.add_argument(
        "--mode",
        choices=("streaming", "all-coded"),
        default="streaming",
        help="streaming: sinks and tail are read exactly; all-coded: every token is read coded, the first ones "
        "and a query's own included, but for an incomplete last group (default %(default)s)",
    )
    add_protocol_arguments(text, calibrated_on="from the other part of the text", sinks="that stay exact")
    add_seed_argument(text)
    add_output_arguments(parser, Path("kvlathe-eval.jsonl"), "plots")
    add_run_arguments(parser)


def _windows(arguments: argparse.Namespace, corpus: Corpus, tokenizer: Any) -> list[Tensor]:
    """The windows that judge."""
    from ..calibration.text.token_windows import windows

    # One file is running text, as perplexities are usually stated; of many documents each gives a window in turn.
    one_file = arguments.text is not None and len(arguments.text) == 1 and arguments.text[0].is_file()
    seed = None if one_file else arguments.seed
    return windows(tokenizer, corpus.held_out, arguments.window, arguments.windows, seed)


def run_eval(arguments: argparse.Namespace) -> int:
    """``kvlathe eval``."""
    if wrong := unusable(arguments):
        say(wrong)
        return 2
    from ..calibration.text.window_length import check_model_reads
    from ..errors import EvaluationError
    from ..lab.evaluation import PresetMethod, Results, evaluate
    from ..lab.evaluation.plots import PLOTS
    from ..lab.evaluation.report import describe_mode, html_report
    from ..lab.evaluation.run import make_setting
    from ..lab.evaluation.table import markdown

    check_drawable(arguments)
    results = Results(arguments.output)
    loaded, corpus = model_and_text(arguments)
    check_model_reads(loaded.model.config, arguments.window)
    judged = _windows(arguments, corpus, loaded.tokenizer)
    setting = make_setting(
        loaded.model,
        judged,
        model_name=loaded.name,
        text_name=corpus.name,
        mode=arguments.mode,
        n_sinks=arguments.sinks,
        tail=arguments.tail,
    )
    probe = probed(loaded.model)
    chosen = chosen_methods(
        arguments, loaded, corpus, probe, n_sinks=setting.n_sinks, window=arguments.window
    )
    methods: list[Method] = [PresetMethod(preset, probe.shape, label) for label, preset in chosen.presets]
    methods += chosen.baselines
    if not methods:
        raise EvaluationError(f"nothing to measure: {'; '.join(chosen.skipped)}")
    say(
        f"{loaded.name}: {len(judged)} windows of {arguments.window} tokens of {corpus.name}; {describe_mode(setting)}"
    )
    done = gather(
        lambda on_kept: evaluate(
            loaded.model, judged, methods, setting, probe.shape, results, on_kept=on_kept
        ),
        results.path,
        lambda result, kept: say(format_result(result) + (f"  (kept from {results.path})" if kept else "")),
    )
    print(markdown(done))
    print(
        f"\nThe exact cache's perplexity is {done[0].quality.exact_perplexity:.4f}. KLD in nats; bits count the whole "
        f"cache at {setting.window} tokens. Results are in {results.path}."
    )
    write_drawings(arguments, done, chosen.skipped, html_report, PLOTS)
    return 0


def format_result(result: Result) -> str:
    """One line for the person who waits."""
    quality = result.quality
    return (
        f"{result.name:>24}  {result.size.bits_per_value:6.2f} bits  KLD {quality.kld:9.6f}  "
        f"perplexity {100 * quality.ppl_delta:+9.3f} %  top-1 {100 * quality.top1:6.2f} %  {result.seconds:4.0f} s"
    )
