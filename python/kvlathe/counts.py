"""Whole numbers that users and files give."""

from __future__ import annotations

from typing import TypeGuard


def is_count(given: object) -> TypeGuard[int]:
    """Whether something is a whole number, at least 0."""
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0
