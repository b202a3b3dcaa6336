"""Trials as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from ..evaluation import interval
from ..evaluation.table import markdown_table
from .run import Trial

Rows = list[tuple[str, ...]]


def by_name(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials by the name of their cache, in the order in which names first come."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.name, []).append(trial)
    return found


def rows_by_length(trials: Sequence[Trial]) -> Rows:
    """Heading and a row a cache: share found and mean log-probability a token, by length and over all."""
    lengths = sorted({trial.length for trial in trials})
    groups = [(f"{length:,}", _with(lambda trial: trial.length, length)) for length in lengths]
    return _rows(trials, [*groups, ("all", lambda _: True)])


def rows_by_kind(trials: Sequence[Trial]) -> Rows:
    """Heading and a row a cache: share found and mean log-probability a token, by kind of needle."""
    kinds = list(dict.fromkeys(trial.kind for trial in trials))
    return _rows(trials, [(kind, _with(lambda trial: trial.kind, kind)) for kind in kinds])


def _with(attribute: Callable[[Trial], object], value: object) -> Callable[[Trial], bool]:
    return lambda trial: attribute(trial) == value


def _rows(trials: Sequence[Trial], groups: Sequence[tuple[str, Callable[[Trial], bool]]]) -> Rows:
    heading = ["cache", "coded bits"]
    for label, _ in groups:
        heading += [f"{label}: found", "log-prob"]
    heading.append("against exact (95 %)")
    caches = by_name(trials)
    rows = [tuple(heading)]
    for name, of_cache in caches.items():
        cells = [name, f"{of_cache[0].coded_bits:.2f}"]
        for _, belongs in groups:
            chosen = [trial for trial in of_cache if belongs(trial)]
            found = f"{100 * fmean(trial.found for trial in chosen):.0f} %" if chosen else ""
            cells += [found, f"{fmean(t.log_prob_per_token for t in chosen):.3f}" if chosen else ""]
        cells.append(_against(caches.get("exact", []), of_cache))
        rows.append(tuple(cells))
    return rows


def _against(exact: Sequence[Trial], trials: Sequence[Trial]) -> str:
    """Mean change of the log-probability a token from the exact cache's, on the same prompts, in nats."""
    by_prompt = {trial.prompt: trial.log_prob_per_token for trial in exact}
    changes = [
        trial.log_prob_per_token - by_prompt[trial.prompt] for trial in trials if trial.prompt in by_prompt
    ]
    if not changes or trials[0].name == "exact":
        return ""
    low, high = interval(changes)
    return f"{fmean(changes):+.3f} ({low:+.3f} to {high:+.3f})"


def markdown(rows: Rows) -> str:
    """Rows, the first of them the heading, as a Markdown table."""
    heading, *body = rows
    return markdown_table(heading, body)
