"""The run-time cache: a `DynamicCache` whose layers hold keys and values compressed."""

from __future__ import annotations

from .dynamic_cache import CompressedDynamicCache, load_preset_cache

__all__ = ["CompressedDynamicCache", "load_preset_cache"]
