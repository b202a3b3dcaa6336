"""A report as one HTML file that needs nothing else: no scripts, no fonts, plots inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from .plots import PLOTS, is_ours, svg
from .run import LENGTHS, Result, Setting
from .table import COLUMNS, row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin-bottom: 0 } h2 { font-size: 1.2em; margin-top: 2em }
.what { color: #666; margin-top: .2em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
th { border-bottom: 2px solid #999; font-weight: 600 } th:first-child, td:first-child { text-align: left }
tr.ours { background: #eef5fb; font-weight: 600 }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto }
dl { display: grid; grid-template-columns: max-content auto; gap: .2em 1.2em } dt { color: #666 } dd { margin: 0 }
"""

_CAPTIONS = {
    "kld-against-bits": "Every method at its rates. Bars are 95 % bootstrap intervals over windows.",
    "kld-by-position": "Means over all windows, from where the first coded token can be read.",
    "bits-by-layer": "What the allocation gives to the keys (K) and the values (V) of each layer.",
}

_MODES = {
    "streaming": "every query reads the first {n_sinks} and the latest {tail} tokens exactly, all others coded",
    "all-coded": "every query reads every token coded, its own included; no sinks, no tail",
}


def describe_mode(setting: Setting) -> str:
    """The protocol in words."""
    return _MODES[setting.mode].format(n_sinks=setting.n_sinks, tail=setting.tail)


def html_report(results: Sequence[Result], skipped: Sequence[str] = ()) -> str:
    """The report of results of one setting, as HTML.

    Args:
        results: at least one; shown in this order.
        skipped: sentences on what was not run, and why.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    setting = results[0].setting
    drawn = {_CAPTIONS[name]: draw(results) for name, draw in PLOTS.items()}
    return page(
        f"Caches of {setting.model}",
        f"{setting.n_windows} windows of {setting.window:,} tokens of {setting.text}",
        f"""<div class=wide>{_table(results)}</div>
{figures(drawn)}
<h2>Size at other lengths</h2>
<div class=wide>{_sizes(results)}</div>
{not_run(skipped)}
<h2>What the numbers mean</h2>
{_meanings(setting, results[0].quality.exact_perplexity)}""",
    )


def figures(drawn: Mapping[str, Figure]) -> str:
    """Plots, by their captions, as HTML."""
    return "\n".join(
        f"<figure>{svg(figure)}<figcaption class=what>{caption}</figcaption></figure>"
        for caption, figure in drawn.items()
    )


def not_run(skipped: Sequence[str]) -> str:
    """Sentences on what was not run, as HTML; nothing if there are none."""
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in skipped)
    return f"<h2>Not run</h2><ul>{notes}</ul>" if notes else ""


def page(title: str, what: str, body: str) -> str:
    """An HTML page with our style: a title and a line below it, both plain text, and a body in HTML."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class=what>{escape(what)}</p>
{body}
</body></html>
"""


def _table(results: Sequence[Result]) -> str:
    return html_table(COLUMNS, [(row(result), is_ours(result.family)) for result in results])


def _sizes(results: Sequence[Result]) -> str:
    columns = ("cache", *(f"bits at {n:,} tokens" for n in LENGTHS), "basis, MB")
    rows = [
        (
            (
                result.name,
                *(f"{result.bits_at[n]:.2f}" for n in LENGTHS),
                f"{result.size.basis_bytes / 1e6:.2f}",
            ),
            is_ours(result.family),
        )
        for result in results
    ]
    return html_table(columns, rows)


def html_table(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """A table of cells in plain text; rows that come with True are emphasised."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=ours' if ours else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells, ours in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _meanings(setting: Setting, exact_perplexity: float) -> str:
    meanings = {
        "mode": f"{setting.mode}: {describe_mode(setting)}",
        "exact cache": f"perplexity {exact_perplexity:.4f}, model in {setting.dtype}",
        "bits": "8 · bytes of the whole cache / numbers in it, at the window's length: codes, scales, norms, padding, "
        "and exact tokens at 16 bits a value",
        "coded bits": "the same for the coded tokens alone, as papers state it",
        "basis": "rotations, codebooks and calibrated tables, which all caches of the model share; not in the bits",
        "KLD": "KL divergence of the next token's distribution from the exact cache's, in nats: mean, median, 99th "
        "percentile and worst over all positions",
        "top-1": "share of positions where the most likely next token is the same",
        "95 %": "two-sided bootstrap interval over windows; with few windows an order of magnitude",
        "seconds": "to measure, not to decode",
        "kvlathe": f"version {setting.library_version}; model {setting.model_digest}, text {setting.text_digest}",
    }
    return definitions(meanings)


def definitions(meanings: Mapping[str, str]) -> str:
    """Words and what they mean, both plain text, as HTML."""
    return (
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in meanings.items()) + "</dl>"
    )
