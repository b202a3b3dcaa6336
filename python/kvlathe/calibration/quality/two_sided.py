"""Two-sided attention: near and sink tokens are read exactly, far tokens from a coded copy.

A compressed cache keeps the first tokens (sinks) and the latest tokens (tail) exact, so a query reads a token
from the coded copy only when the token is *far*::

    far(q_pos, k_pos) = q_pos - k_pos >= tail  and  k_pos >= n_sinks

Positions are cache slots, counted from 0; with fewer queries than keys the queries are the last ones. Whoever
calibrates or judges a code must respect this split: a gradient that includes what near queries read, or an
error that near queries see, describes a cache that does not exist. A plan is used in one of two ways, chosen
by its callbacks:

* ``on_backward``: attention is exact; the backward pass also hands out the part of the gradients of K and V
  that flows through far pairs. This equals giving the model two copies of K and V, one per side of the split,
  and reading the gradient of the far copy, without the memory of a second copy.
* ``code_keys`` / ``code_values``: no gradients; far pairs are scored with coded keys and weigh coded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .two_sided_interface import ATTENTION_NAME, takes_functions, through_interface
from .two_sided_kernel import TwoSidedPlan, two_sided_attention
from .two_sided_sdpa import attention_name, through_sdpa

__all__ = ["ATTENTION_NAME", "TwoSidedPlan", "two_sided", "two_sided_attention"]

Inputs = Callable[[], dict[str, Any]]


@contextmanager
def two_sided(model: PreTrainedModel, plan: TwoSidedPlan) -> Iterator[Inputs]:
    """Let ``model`` attend as ``plan`` says inside the ``with`` block, and as before after it.

    Torch's `scaled_dot_product_attention` is answered for the time of the block, whoever wrote the code that calls it.
    A model that was loaded with another attention function, as those with soft caps and learned sinks are, is given
    one of ours through transformers' interface.

    Yields:
        What a pass takes besides its tokens, asked for anew for every pass: ``model(input_ids=ids, **inputs())``. Run
        whole windows only.

    Raises:
        ModelError: in a pass, or at the end of the block: attention that goes neither way.
    """
    if attention_name(model) != "sdpa" and takes_functions(model):
        with through_interface(model, plan):
            yield lambda: {"use_cache": False}
    else:
        with through_sdpa(model, plan) as inputs:
            yield inputs
