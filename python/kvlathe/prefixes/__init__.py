"""Prefixes that last: a cache in chunks, kept in a folder, an object store or Redis, and found again by its tokens."""

from __future__ import annotations

from .store import PrefixStore

__all__ = ["PrefixStore"]
