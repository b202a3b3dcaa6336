"""`attach`: attention from packed blocks for models that compute what torch's SDPA cannot say.

Most models need nothing: their attention is torch's `scaled_dot_product_attention`, which lazy keys and values serve by
themselves (`kvlathe.lazy`). Caps on scores (Gemma 2) and learned sinks (gpt-oss) are no part of that, so transformers
runs such models with "eager" attention, operation by operation. `attach(model)` puts itself between those modules and
their eager function, and there only: no option is set, and nothing else of the model is touched.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .errors import AttachWarning, ModelError
from .lazy import LazyStates, Refusal, attend, causal_mask

ATTENTION_NAME = "kvlathe"
_EAGER = "eager"
# Arguments of which another value may mean another function.
_PLAIN = (int, float, str)
# Of a trial: more than most windows, so that one that hides tokens by itself is noticed.
_TRIED_TOKENS, _TRIED_QUERIES = 300, 3
_TRIED_TOLERANCE = 1e-3
Model = TypeVar("Model", bound=PreTrainedModel)


class _Attached:
    """Stands for the config in an attention module: all is the config's but the name of the attention.

    It goes with the module wherever that is copied, pickled or sent. Another attention that is set later wins.

    Args:
        config: the module's own.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config
        # Whether the module's eager function computes what we do, by what it was asked for; found when it first is.
        self.__dict__["verdicts"] = {}

    @property
    def _attn_implementation(self) -> Any:
        named = self.config._attn_implementation
        return ATTENTION_NAME if named == _EAGER else named

    def __getattr__(self, name: str) -> Any:
        if "config" not in self.__dict__:  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.__dict__["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["config"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["config"], name)

    def __eq__(self, other: object) -> bool:
        return bool(self.config == (other.config if isinstance(other, _Attached) else other))

    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attached, (self.config,)


@cache
def _names_seen_by(forward: Callable[..., Any]) -> dict[str, Any]:
    """Globals of the file that a forward is written in, whatever has been wrapped around it."""
    return getattr(inspect.unwrap(forward), "__globals__", {})


def _eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """What a module calls for "eager" attention through transformers' interface; None if it does not use that."""
    names = _names_seen_by(type(module).forward)
    return names.get("eager_attention_forward") if "ALL_ATTENTION_FUNCTIONS" in names else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What attached modules call: from the blocks where keys are lazy, else their eager function."""
    eager = _eager_function(module)
    if eager is None:
        raise ModelError(
            f"{type(module).__name__} was attached, and the file of its class has no eager attention any more; call "
            f"detach(model)"
        )
    if not (isinstance(key, LazyStates) and isinstance(value, LazyStates)):
        return eager(module, query, key, value, attention_mask, **kwargs)
    if key.handout.dense is not None:
        key.handout.see(attention_mask)
    elif not _wants_weights(module, kwargs) and _is_ours(module, eager, (query, key, value), kwargs):
        found = attend(
            query,
            key,
            value,
            attention_mask,
            kwargs.get("dropout", 0.0) if module.training else 0.0,
            scale=kwargs.get("scaling"),
            enable_gqa=True,
            softcap=kwargs.get("softcap"),
            sink_scores=kwargs.get("s_aux"),
        )
        if not isinstance(found, Refusal):
            return found.transpose(1, 2).contiguous(), None
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


def _is_ours(
    module: nn.Module, eager: Callable[..., Any], states: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a module's eager function is softmax attention with no more than a cap and sinks: it is tried once, on
    random tokens, for each set of arguments that it is called with.
    """
    verdicts: dict[Any, bool] = module.config.__dict__["verdicts"]
    asked = tuple(
        (name, given if isinstance(given, _PLAIN) else None) for name, given in sorted(kwargs.items())
    )
    if asked not in verdicts:
        verdicts[asked] = _agrees(module, eager, states, kwargs)
    return verdicts[asked]


@torch.no_grad()
def _agrees(
    module: nn.Module, eager: Callable[..., Any], states: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> bool:
    """On random tokens in place of these queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    window = kwargs.get("sliding_window")
    n_tokens = max(_TRIED_TOKENS, 2 * window if isinstance(window, int) else 0)

    def random(like: Any, n: int) -> Tensor:
        # In float32 whatever the model computes in: a coarser format would hide what is different.
        return 3.0 * torch.randn((1, like.shape[1], n, like.shape[3]), generator=generator).to(like.device)

    numbers = (_TRIED_QUERIES, n_tokens, n_tokens)
    queries, keys, values = (random(like, n) for like, n in zip(states, numbers, strict=True))
    seen = causal_mask(_TRIED_QUERIES, n_tokens)[None, None].to(queries.device)
    hidden = torch.zeros_like(seen, dtype=queries.dtype).masked_fill(~seen, torch.finfo(queries.dtype).min)
    kwargs = {**kwargs, "dropout": 0.0}
    if isinstance(kwargs.get("s_aux"), Tensor):
        kwargs["s_aux"] = kwargs["s_aux"].float()
    try:
        given = eager(module, queries, keys, values, hidden, **kwargs)[0].float()
        expected = _reference(queries, keys, values, hidden, kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it wants something that only a whole pass has
    if given.shape != expected.shape:
        return False
    return float((given - expected).norm()) <= _TRIED_TOLERANCE * float(expected.norm())


def _reference(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Attention [1, q, Hq, D] as `kvlathe.lazy.attend` means it, in float32."""
    n_rep = queries.shape[1] // keys.shape[1]
    keys, values = (states.float().repeat_interleave(n_rep, 1) for states in (keys, values))
    scaling = kwargs.get("scaling")
    scores = queries.float() @ keys.mT * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if (softcap := kwargs.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + hidden.float()
    if (sinks := kwargs.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2)


def _attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that know a layer of the cache, and choose their attention by a config. All of them, where calibration
    wants one a layer (`model_loading.attention_modules`).
    """
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and _attention_of(module) is not None:
            yield module


def _attention_of(module: nn.Module) -> str | None:
    """The name of the attention that a module's config chooses; None if it has no such config."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def attach(model: Model) -> Model:
    """Let modules with eager attention read packed blocks. Twice is the same as once; `detach` undoes it.

    Models whose attention is torch's SDPA need no `attach`; it then gives an `AttachWarning` and does nothing.

    Returns:
        The model itself.
    """
    for module in _servable(model):
        module.config = _Attached(module.config)  # type: ignore[assignment]
    if not is_attached(model):
        warnings.warn(f"attach() has nothing to do: {_why_nothing(model)}", AttachWarning, stacklevel=2)
    return model


def _servable(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in _attention_modules(model)
        if _attention_of(module) == _EAGER and _eager_function(module) is not None
    ]


def can_attach(model: nn.Module) -> bool:
    """Whether `attach` has anything to do for a model that is not attached."""
    return bool(_servable(model))


def _why_nothing(model: nn.Module) -> str:
    named = sorted({str(_attention_of(module)) for module in _attention_modules(model)})
    if named == ["sdpa"]:
        return (
            "attention of this model is torch's scaled_dot_product_attention, which a kvlathe cache serves from its "
            "packed tokens without attach()"
        )
    if named == [_EAGER]:
        return (
            f"{type(model).__name__} computes attention in code of its own, so its cache is expanded; "
            f"attn_implementation='sdpa' is served from packed tokens, if the model has it"
        )
    return (
        f"attention of this model is {', '.join(named) or 'unknown to transformers'}, which reads whole tensors, so "
        f"its cache is expanded; load it with attn_implementation='sdpa' (or 'eager', and attach() again) to be served "
        f"from packed tokens"
    )


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` holds for modules of this model."""
    return any(isinstance(getattr(module, "config", None), _Attached) for module in model.modules())


def detach(model: Model) -> Model:
    """Undo `attach`; without effect on a model that is not attached."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, _Attached):
            module.config = config.config
    return model
