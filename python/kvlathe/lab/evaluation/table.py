"""Results as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .run import Result

COLUMNS = (
    "cache",
    "bits",
    "coded bits",
    "MB",
    "KLD (95 %)",
    "median",
    "99th",
    "worst",
    "perplexity change (95 %)",
    "top-1",
    "seconds",
)


def row(result: Result) -> tuple[str, ...]:
    """A result as cells, in the order of `COLUMNS`. KLD in nats."""
    quality, size = result.quality, result.size
    low, high = quality.kld_interval()
    ppl_low, ppl_high = (100 * bound for bound in quality.ppl_delta_interval())
    return (
        result.name,
        f"{size.bits_per_value:.2f}",
        f"{size.coded_bits:.2f}",
        f"{size.total_bytes / 1e6:.2f}",
        f"{_short(quality.kld)} ({_short(low)} to {_short(high)})",
        _short(quality.kld_median),
        _short(quality.kld_p99),
        _short(quality.kld_max),
        f"{100 * quality.ppl_delta:+.2f} % ({ppl_low:+.2f} to {ppl_high:+.2f})",
        f"{100 * quality.top1:.2f} %",
        f"{result.seconds:.0f}",
    )


def markdown(results: Iterable[Result]) -> str:
    """A table with one line a result, in the order given."""
    return markdown_table(COLUMNS, map(row, results))


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heading), *lines[1:]])


def _short(nats: float) -> str:
    """Two or three significant digits, never in powers of ten above 10^-5."""
    if nats == 0:
        return "0"
    if nats < 1e-5:
        return f"{nats:.1e}"
    digits = 2 if nats >= 1 else 3 if nats >= 0.1 else 4 if nats >= 0.01 else 5 if nats >= 0.001 else 6
    return f"{nats:.{digits}f}"
