"""vLLM: compressed pages in a tier behind its own cache, for ``TieringOffloadingSpec`` (docs/serving.md)."""

from __future__ import annotations

from .cpu import CpuTieringSpec
from .tier import CompressedTier

__all__ = ["CompressedTier", "CpuTieringSpec"]
