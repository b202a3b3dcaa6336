"""The trials as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.plots import is_ours
from ..evaluation.report import definitions, figures, html_table, not_run, page
from .needle import KINDS
from .plots import PLOTS
from .run import Trial
from .table import Rows, by_name, rows_by_kind, rows_by_length

_CAPTIONS = {
    "needle-found": "Share of needles that greedy decoding gives exactly. Depth 0 % is the beginning of the text.",
    "needle-log-probability": "Mean log-probability of the answer's tokens; 0 is certain, all below -3 looks alike.",
}


def html_report(trials: Sequence[Trial], skipped: Sequence[str] = ()) -> str:
    """The report of trials of one setting, as HTML.

    Args:
        trials: at least one; caches are shown in the order in which they come.
        skipped: sentences on what was not run, and why.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    setting = trials[0].setting
    drawn = {_CAPTIONS[name]: draw(trials) for name, draw in PLOTS.items()}
    n_prompts = len({trial.prompt for trial in trials})
    meanings = {
        "found": "share of needles whose answer greedy decoding gives token by token",
        "log-prob": "natural logarithm of the probability of the answer's tokens, those before given; mean over "
        "tokens, then over needles",
        "against exact": "mean change of that from the exact cache's on the same prompts, with a two-sided 95 % "
        "bootstrap interval over prompts",
        "coded bits": "bits a number of the coded tokens, all side information included",
        **{kind.name: kind.about for kind in KINDS.values()},
        "ours": f"the real cache, fed in chunks of {setting.chunk} tokens that read what is coded already; its "
        f"preset's sinks and the latest {setting.tail} tokens exact",
        "baselines": f"the text is read exactly, then coded but for {setting.n_sinks} sinks and the latest "
        f"{setting.tail} tokens; question and answer read it coded",
        "kvlathe": f"version {setting.library_version}; model {setting.model_digest} in {setting.dtype}",
    }
    return page(
        f"Needles found by {setting.model}",
        f"{n_prompts} needles, one at a time, in {setting.text}",
        f"""<div class=wide>{_table(rows_by_length(trials), trials)}</div>
{figures(drawn)}
<h2>By kind of needle</h2>
<div class=wide>{_table(rows_by_kind(trials), trials)}</div>
{not_run(skipped)}
<h2>What the numbers mean</h2>
{definitions(meanings)}""",
    )


def _table(rows: Rows, trials: Sequence[Trial]) -> str:
    families = {name: of_cache[0].family for name, of_cache in by_name(trials).items()}
    heading, *body = rows
    return html_table(heading, [(row, is_ours(families[row[0]])) for row in body])
