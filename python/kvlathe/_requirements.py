"""Which transformers kvlathe works with; told at import, before a missing name somewhere inside would tell it badly."""

from __future__ import annotations

import importlib.metadata
import re

# Tested: see docs/models.md. The same range stands in pyproject.toml.
OLDEST_TRANSFORMERS = (5, 20)
FIRST_UNTESTED_MAJOR = 6


def check_transformers() -> None:
    """Refuse a transformers whose caches follow another protocol. One that is missing is not judged here.

    Raises:
        ImportError: transformers is older than `OLDEST_TRANSFORMERS`, or of a major version nobody has tried.
    """
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None:
        return
    given = (int(numbers[1]), int(numbers[2]))
    if given < OLDEST_TRANSFORMERS or given[0] >= FIRST_UNTESTED_MAJOR:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"kvlathe needs transformers {oldest} or newer, below {FIRST_UNTESTED_MAJOR}, but {found} is installed, "
            f"whose caches work in another way; install one with: pip install 'kvlathe[torch]'"
        )
