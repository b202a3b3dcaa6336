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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ._two_sided_kernel import TwoSidedPlan, two_sided_attention
from .errors import CalibrationError, ModelError

__all__ = ["ATTENTION_NAME", "TwoSidedPlan", "two_sided", "two_sided_attention"]

ATTENTION_NAME = "kvlathe_two_sided"

# Keyed by attention module, so that two models can follow two plans at once.
_PLANS: WeakKeyDictionary[nn.Module, TwoSidedPlan] = WeakKeyDictionary()


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Entry point that transformers calls; modules without a plan (vision towers) get plain SDPA."""
    plan = _PLANS.get(module)
    if plan is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            softcap=softcap,
            **kwargs,
        )
    if dropout:
        raise CalibrationError("attention dropout is on: call model.eval() first")
    if kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} adds a position bias to its scores, which is not supported"
        )
    out = two_sided_attention(
        query,
        key,
        value,
        plan,
        layer_idx=cast(int, module.layer_idx),
        scaling=scaling,
        attention_mask=attention_mask,
        softcap=softcap,
        s_aux=s_aux,
        sliding_window=sliding_window,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention_function)
# Without a mask function of that name transformers would build no mask, and padding would silently be
# attended to.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object that names an attention implementation in this model, each once."""
    pending: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    while pending:
        config = pending.pop()
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


@contextmanager
def two_sided(model: PreTrainedModel, plan: TwoSidedPlan) -> Iterator[None]:
    """Let ``model`` attend as ``plan`` says inside the ``with`` block, and as before after it.

    Run whole windows without a cache (``use_cache=False``), or with a cache that keeps every token: a cache
    that drops tokens shifts the slots that ``n_sinks`` counts.

    Raises:
        ModelError: the model does not call transformers' attention interface.
    """
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and not getattr(module, "is_cross_attention", False)
    ]
    saved_configs = [(config, config._attn_implementation_internal) for config in _configs(model)]
    saved_plans = {module: _PLANS.get(module) for module in modules}
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
            raise ModelError(
                f"{type(model).__name__} computes attention by itself instead of through transformers' "
                "attention interface, so its attention cannot be replaced"
            )
        for module in modules:
            _PLANS[module] = plan
        yield
    finally:
        for module, old in saved_plans.items():
            if old is None:
                _PLANS.pop(module, None)
            else:
                _PLANS[module] = old
        for config, implementation in saved_configs:
            config._attn_implementation_internal = implementation
