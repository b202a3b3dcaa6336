"""The run-time cache: a `DynamicCache` whose layers hold keys and values compressed."""

from __future__ import annotations

from . import saving  # noqa: F401, what reads saved caches
from .dynamic_cache import CompressedDynamicCache
from .preset_cache import load_preset_cache

__all__ = ["CompressedDynamicCache", "load_preset_cache"]
