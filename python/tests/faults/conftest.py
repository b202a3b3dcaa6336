"""Adds up, over all tests of this folder, the faults that they say they survived (`record_property`)."""

from __future__ import annotations

from collections import Counter
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    totals: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, number in getattr(report, "user_properties", []):
            totals[name] += number
    if totals:
        terminalreporter.write_line(
            "survived: " + ", ".join(f"{number} {name}" for name, number in sorted(totals.items()))
        )
