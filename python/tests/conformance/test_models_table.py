"""`docs/models.md` says what the matrix expects, and the matrix is tested."""

from __future__ import annotations

import importlib.metadata

from families import FAMILIES
from table import PAGE, all_pass, committed, render


def test_the_committed_table_is_up_to_date() -> None:
    assert committed() == render(all_pass()), "run: python tests/conformance/table.py"


def test_every_family_is_in_the_table() -> None:
    for family in FAMILIES:
        assert f"| {family.title} |" in committed()


def test_the_page_names_the_range_of_versions() -> None:
    extras = importlib.metadata.metadata("kvlathe").get_all("Requires-Dist") or []
    page = PAGE.read_text(encoding="utf-8")
    for name in ("transformers", "torch"):
        wanted = next(line for line in extras if line.startswith(name)).split(";")[0].strip()
        lowest = wanted.split(">=")[1].split(",")[0]
        assert f"{name} {lowest}" in page
