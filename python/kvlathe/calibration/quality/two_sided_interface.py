"""Two-sided attention through transformers' attention interface, for models that do not run on torch's SDPA: those with
soft caps (Gemma 2) or learned sinks (gpt-oss), which that cannot say, and any that was loaded with another function.
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

from ...errors import CalibrationError, ModelError
from .two_sided_kernel import TwoSidedPlan, two_sided_attention

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


def takes_functions(model: PreTrainedModel) -> bool:
    """Whether the model calls its attention through transformers' interface."""
    with _restored(model):
        return _set(model)


def _set(model: PreTrainedModel) -> bool:
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except ValueError:  # some say so
        return False
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Each config names its own attention again after the ``with`` block."""
    saved = [(config, config._attn_implementation_internal) for config in _configs(model)]
    try:
        yield
    finally:
        for config, implementation in saved:
            config._attn_implementation_internal = implementation


@contextmanager
def through_interface(model: PreTrainedModel, plan: TwoSidedPlan) -> Iterator[None]:
    """As `two_sided`, for a model that takes functions."""
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and not getattr(module, "is_cross_attention", False)
    ]
    saved_plans = {module: _PLANS.get(module) for module in modules}
    with _restored(model):
        try:
            _set(model)
            for module in modules:
                _PLANS[module] = plan
            yield
        finally:
            for module, old in saved_plans.items():
                if old is None:
                    _PLANS.pop(module, None)
                else:
                    _PLANS[module] = old
