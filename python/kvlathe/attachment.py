"""`attach`: a model's attention reads packed blocks directly while it decodes, and nothing is expanded.

    attach(model)
    model.generate(**inputs, past_key_values=cache)   # cache: CompressedDynamicCache

The model keeps working with every other cache. Devices other than the CPU and layers that are not coded by the
calibrated codec go through the model's dense attention as before. `generate` reads long prompts into our cache in
chunks, so that neither a layer's whole keys and values nor the whole prompt's activations exist at any time.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import CompressedDynamicCache
from .cache.layer import CompressedLayer, Stub
from .cache.padding import PaddedRows, padded_rows_of_first_pass
from .cache.section_attention import causal_mask
from .errors import ModelError
from .model_loading import attention_modules
from .two_sided import TwoSidedPlan, two_sided_attention

ATTENTION_NAME = "kvlathe"
# Tokens of a prompt that `generate` gives to the model at once; more where rows begin with that much padding.
PREFILL_CHUNK_TOKENS = 512
MOST_CHUNK_TOKENS = 4096
Model = TypeVar("Model", bound=PreTrainedModel)

# Architectures whose attention hands keys from the cache to the attention function untouched; each is tested.
SUPPORTED_MODEL_TYPES = frozenset(
    {
        "cohere",
        "gemma2",
        "gemma3_text",
        "glm",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
    }
)


class _Attached:
    """What `detach` undoes."""

    def __init__(self, implementation: str, hooks: list[RemovableHandle]) -> None:
        self.implementation, self.hooks = implementation, hooks


_ATTACHED: WeakKeyDictionary[PreTrainedModel, _Attached] = WeakKeyDictionary()


def _attention(
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
    """What transformers calls: from the blocks where `key` is a stub, else dense."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    stub: Stub | None = getattr(key, "kvlathe_stub", None)
    if stub is not None:
        out = stub.layer.attend(
            query,
            mask=attention_mask,
            scaling=scale,
            softcap=softcap,
            sink_scores=s_aux,
            n_tokens=stub.n_tokens,
        )
        return out, None
    if softcap is None and s_aux is None:
        n_queries, n_tokens = query.shape[2], key.shape[2]
        if attention_mask is None and n_queries not in (1, n_tokens) and _is_causal(module, kwargs):
            # SDPA would put the first query at the first token.
            attention_mask = causal_mask(n_queries, n_tokens, 0, n_tokens, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # SDPA knows neither: exact attention of our own.
    plan = TwoSidedPlan(tail=key.shape[2] + 1, n_sinks=0)
    out = two_sided_attention(
        query,
        key,
        value,
        plan,
        layer_idx=int(getattr(module, "layer_idx", 0) or 0),
        scaling=scale,
        attention_mask=attention_mask,
        softcap=softcap,
        s_aux=s_aux,
        sliding_window=sliding_window,
    )
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether no mask means that queries see no later tokens, as `sdpa_attention_forward` has it."""
    told = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _shows_all(attention_mask: Tensor | None, n_tokens: int) -> bool:
    """Whether a mask [B, tokens] hides none of the first ``n_tokens``; to transformers a shorter one hides the rest."""
    if attention_mask is None:
        return True
    return attention_mask.shape[1] >= n_tokens and bool(attention_mask[:, :n_tokens].all())


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' `sdpa_mask`, but None for all causal attention whose last query is at the last token: making a mask
    for a chunk of a prompt, and looking through it in every layer, takes longer than knowing.
    """
    may_skip = allow_is_causal_skip and local_size is None and not torch.compiler.is_compiling()
    # Static caches have a tensor for an offset.
    aligned = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if may_skip and aligned and _shows_all(attention_mask, kv_length):
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        # For the first tokens of a static cache it would mean something else.
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        **kwargs,
    )
    return mask


def _attention_name(config: Any) -> str | None:
    """The attention that a model's config names: the property `_attn_implementation`, which every layer would wait for
    in every step, or the attribute behind it.
    """
    held = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal")
    return held if held is not None else config._attn_implementation


def _announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module runs: tell its cache layer that stubs will do."""
    cache = kwargs["past_key_values"] if "past_key_values" in kwargs else kwargs.get("layer_past")
    if isinstance(cache, CompressedDynamicCache):
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        # Someone may have set another attention since, which would take stubs for keys.
        ours = _attention_name(module.config) == ATTENTION_NAME
        # transformers' own layers go through dense attention.
        if ours and isinstance(layer, CompressedLayer):
            layer.attends_next = True
            mask = kwargs.get("attention_mask")
            first = isinstance(mask, Tensor) and mask.dtype == torch.bool and not layer.get_seq_length()
            # Without padding there may be no mask. That of a sliding window hides more than padding.
            if first and not layer.is_sliding and mask.shape[2] == mask.shape[3]:  # type: ignore[union-attr]
                layer.padding_seen = padded_rows_of_first_pass(mask)  # type: ignore[arg-type]


def _generate_in_chunks(
    model: PreTrainedModel, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """The model's `generate`, with a chunked prefill where the cache is ours and the caller has not chosen."""
    config = generation_config or getattr(model, "generation_config", None)
    chosen = "prefill_chunk_size" in kwargs or getattr(config, "prefill_chunk_size", None) is not None
    # transformers cannot cut embeddings into chunks.
    embedded = kwargs.get("inputs_embeds") is not None
    if isinstance(kwargs.get("past_key_values"), CompressedDynamicCache) and not chosen and not embedded:
        kwargs["prefill_chunk_size"] = _chunk_tokens(kwargs["past_key_values"], kwargs.get("attention_mask"))
    return type(model).generate(model, inputs, generation_config, *args, **kwargs)  # type: ignore[attr-defined]


def _chunk_tokens(cache: CompressedDynamicCache, mask: Any) -> int:
    """Chunks that reach to every row's first tokens, which stay exact (`kvlathe.cache.padding`)."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or cache.get_seq_length():
        return PREFILL_CHUNK_TOKENS
    n_sinks = max(
        (layer.policy.n_sinks for layer in cache.layers if isinstance(layer, CompressedLayer)), default=0
    )
    longest = max(PaddedRows.of(mask).lengths)
    reach = longest + n_sinks if longest and n_sinks else 0
    return max(PREFILL_CHUNK_TOKENS, min(reach, MOST_CHUNK_TOKENS))


def attach(model: Model) -> Model:
    """Let the model decode straight from a `CompressedDynamicCache`'s blocks. Twice is the same as once.

    With such a cache, `model.generate` also reads prompts in chunks of `PREFILL_CHUNK_TOKENS` tokens (of the longest
    padding in front of a row, and a few more, where that is longer, up to `MOST_CHUNK_TOKENS`) unless it is told
    another ``prefill_chunk_size`` (None: all at once).

    Returns:
        The model itself.

    Raises:
        ModelError: an architecture that this was not tested for. Its caches still work, through expanded tensors.
    """
    if model in _ATTACHED:
        return model
    model_type = model.config.get_text_config(decoder=True).model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"attach() does not know {model_type!r} models (it knows {', '.join(sorted(SUPPORTED_MODEL_TYPES))}); "
            f"use the cache without attach(): it then expands each layer for the time of one call"
        )
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    implementation = str(model.config._attn_implementation)
    model.set_attn_implementation(ATTENTION_NAME)
    hooks = [
        module.register_forward_pre_hook(_announce, with_kwargs=True)
        for module in attention_modules(model).values()
    ]
    if hasattr(type(model), "generate"):
        # A bound method: a deep copy of the model gets one that is bound to the copy.
        model.generate = MethodType(_generate_in_chunks, model)  # type: ignore[assignment]
    _ATTACHED[model] = _Attached(implementation, hooks)
    return model


def is_attached(model: PreTrainedModel) -> bool:
    """Whether `attach` holds for this model."""
    return model in _ATTACHED


def detach(model: Model) -> Model:
    """Undo `attach`; without effect on a model that is not attached."""
    attached = _ATTACHED.pop(model, None)
    if attached is not None:
        for hook in attached.hooks:
            hook.remove()
        model.__dict__.pop("generate", None)
        model.set_attn_implementation(attached.implementation)
    return model
