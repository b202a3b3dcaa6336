"""Lazy keys and values: what stays lazy, what attention asks of them, what expands them.

A cache's `update` returns them. The seam is torch's own `scaled_dot_product_attention`, which every model with that
kind of attention calls in the end, whoever wrote it; nothing of transformers' is known here, and no model is changed.
"""

from __future__ import annotations

from .attention import Refusal, attend
from .masks import PassMemo, causal_mask
from .states import Handout, LazyStates, lazy_pair
from .watchers import unwatched

__all__ = ["Handout", "LazyStates", "PassMemo", "Refusal", "attend", "causal_mask", "lazy_pair", "unwatched"]
