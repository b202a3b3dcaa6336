"""The Python blocks of the specifications and of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    "page",
    ["docs/api.md", "docs/block_format.md", "docs/container_format.md", "docs/prefixes.md", "README.md"],
)
def test_python_blocks_of(page: str) -> None:
    blocks = python_blocks(page)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


def test_the_decoder_of_the_page_reads_the_golden_container() -> None:
    """By the formula that has made it, `crates/kvlathe-prefix/tests/common`."""
    names: dict[str, Any] = {}
    exec(compile(python_blocks("docs/container_format.md")[0], "container_format.md", "exec"), names)
    golden = ROOT / "crates/kvlathe-prefix/tests/golden/container-v1.kvl"
    header, pieces = names["read"](golden.read_bytes())
    assert header["layers"][1] is None and header["layers"][2]["window"] == 20

    def formula(n: int, seed: int) -> bytes:
        return bytes((i * 7 + seed * 31 + i // 5) % 256 for i in range(n))

    assert pieces[2, "value", 1, 1] == formula(27, 21 + 100 + 1)
    assert pieces[0, "value", "tail"] == formula(2 * 2 * 6 * 6 * 4, 1 + 6)
    assert pieces[0, "key", 1, 0] == pieces[0, "key", 0, 0] == formula(27, 0)
    assert pieces["token ids"][:4] == (100_000).to_bytes(4, "little")
