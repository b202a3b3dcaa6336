"""Runs the matrix and writes its table into `docs/models.md`, between the two markers.

python tests/conformance/table.py            # from python/; exits with pytest's status
"""

# As a script it must make the tests' folder importable first.
# ruff: noqa: E402

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- the matrix: written by tests/conformance/table.py -->", "<!-- end of the matrix -->"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from behaviours import BEHAVIOURS
from cache_helpers import preset_of
from families import FAMILIES, Family
from kvlathe.attachment import can_attach
from kvlathe.errors import ModelError

# (family, test function) -> how many of its cells passed
Passed = Counter[tuple[str, str]]


class Recorder:
    """A pytest plugin that counts the cells that passed."""

    def __init__(self) -> None:
        self.passed: Passed = Counter()

    @pytest.hookimpl
    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        params = getattr(getattr(item, "callspec", None), "params", {})
        family = params.get("family")
        if call.when == "call" and call.excinfo is None and isinstance(family, Family):
            self.passed[family.name, item.originalname] += 1


def all_pass() -> Passed:
    """What a run gives in which every test passes."""
    passed: Passed = Counter()
    for family in FAMILIES:
        n = len(BEHAVIOURS) - len(family.not_applicable)
        passed[family.name, "test_exact"] = n
        if family.calibrates:
            passed[family.name, "test_compressed"] = n - len(family.upstream_refuses)
            passed[family.name, "test_what_recurrent_states_refuse"] = len(family.upstream_refuses)
            passed[family.name, "test_logits_within_the_budget"] = 1
            passed[family.name, "test_windows_hold_their_window"] = 1
        else:
            passed[family.name, "test_what_calibration_refuses"] = 1
        if family.calibrates and family.is_served:
            passed[family.name, "test_attention_from_blocks_and_expanded_agree"] = 1
    return passed


def _row(family: Family, passed: Passed) -> str:
    def cell(test: str, total: int) -> str:
        n = passed[family.name, test]
        return f"{n} of {total}" if n < total else str(n)

    n = len(BEHAVIOURS) - len(family.not_applicable)
    exact, refused = cell("test_exact", n), len(family.upstream_refuses)
    if refused and passed[family.name, "test_exact"] == n:
        exact = f"{n - refused}, {refused} refused"
    works = passed[family.name, "test_logits_within_the_budget"]
    coded = cell("test_compressed", n - refused) if family.calibrates else "exact only"
    if family.calibrates and refused and passed[family.name, "test_what_recurrent_states_refuse"] == refused:
        coded += f", {refused} refused"
    if family.calibrates and not works:
        coded += ", logits beyond the budget"
    if family.calibrates and family.is_served:
        blocks = "with `attach`" if can_attach(family.model) else "yes"
        if not passed[family.name, "test_attention_from_blocks_and_expanded_agree"]:
            blocks = "fails"
    else:
        blocks = "no"
    return f"| {family.title} | {family.what} | {exact} | {coded} | {blocks} |"


def _refusal(family: Family) -> str:
    try:
        preset_of(family.name, **family.overrides)
    except ModelError as error:
        return str(error)
    raise AssertionError(f"calibration took {family.name}")


def render(passed: Passed) -> str:
    """The table and the messages, as Markdown."""
    lines = [
        f"| family | what is special | exact ({len(BEHAVIOURS)} behaviours) | compressed | from blocks |",
        "|---|---|---|---|---|",
        *(_row(family, passed) for family in FAMILIES),
        "",
        "Exact only: `calibrate`, and so `kvlathe tune`, refuses the model with this sentence.",
        "",
        *(f"* {family.title}: “{_refusal(family)}”" for family in FAMILIES if not family.calibrates),
    ]
    return "\n".join(lines)


def committed() -> str:
    """What `docs/models.md` has between its markers."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> int:
    recorder = Recorder()
    # The table is what is about to be made, so its own test would fail.
    status = pytest.main(["-q", f"--ignore={HERE}/test_models_table.py", str(HERE)], plugins=[recorder])
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{render(recorder.passed)}\n\n{END}{tail}", encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
