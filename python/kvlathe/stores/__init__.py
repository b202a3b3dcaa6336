"""Where a layer keeps its tokens, and attends to them: native memory on the CPU, torch tensors elsewhere."""

from __future__ import annotations

from .block import Block, BlockRow
from .choice import make_store
from .parts import LayerParts, SideParts
from .store import Attention, Policy, Store

__all__ = ["Attention", "Block", "BlockRow", "LayerParts", "Policy", "SideParts", "Store", "make_store"]
