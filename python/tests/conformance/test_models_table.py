"""`docs/models.md` says what the matrix expects, and the matrix is tested."""

from __future__ import annotations

import re
from pathlib import Path

from families import FAMILIES
from table import PAGE, all_pass, committed, render

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_committed_table_is_up_to_date() -> None:
    assert committed() == render(all_pass()), "run: python tests/conformance/table.py"


def test_every_family_is_in_the_table() -> None:
    for family in FAMILIES:
        assert f"| {family.title} |" in committed()


def test_the_page_names_the_range_of_versions() -> None:
    page, metadata = PAGE.read_text(encoding="utf-8"), PYPROJECT.read_text(encoding="utf-8")
    for name in ("transformers", "torch"):
        lowest = re.search(rf'"{name}>=([\d.]+)', metadata)
        assert lowest is not None
        assert f"{name} {lowest[1]}" in page
