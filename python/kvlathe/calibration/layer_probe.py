"""Which layers of a model hand keys and values to a cache, found by a forward pass with one that looks on.

Neither names of models nor of their classes decide: a layer is one whose code calls `update`, and its attention module
is the one whose forward does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache.layer_kinds import layer_kinds, stock_layers
from ..errors import ModelError
from ..given_model import cache_argument, decoder_inputs, evaluation_mode, plain_tokens, reads_text
from .observing_cache import ObservingCache

_PROBED_TOKENS = 4
# What models raise that cannot take such a cache, or no tokens alone.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class HeldLayer:
    """A layer that hands keys and values to the cache.

    Attributes:
        module: whose forward does it.
        n_kv_heads: KV heads.
        key_dim, value_dim: components of a head.
    """

    module: nn.Module
    n_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """KV heads, components of a key and of a value."""
        return self.n_kv_heads, self.key_dim, self.value_dim


@torch.no_grad()
def held_layers(model: PreTrainedModel) -> dict[int, HeldLayer]:
    """The layers that hand keys and values to a cache, by index, in order.

    Raises:
        ModelError: a model that does not run on a few tokens with a cache of keys and values.
    """
    found: dict[int, HeldLayer] = {}
    name = type(model).__name__
    with evaluation_mode(model), _running(model) as running:

        def note(layer: int, keys: Tensor, values: Tensor) -> None:
            if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
                raise ModelError(
                    f"{name}: layer {layer} caches tensors of shape {list(keys.shape)} and {list(values.shape)}, "
                    f"expected keys and values [batch, heads, tokens, components]"
                )
            found[layer] = HeldLayer(running[-1], keys.shape[1], keys.shape[3], values.shape[3])

        cache = ObservingCache(model.config, note)
        given = decoder_inputs(model, plain_tokens(model, _PROBED_TOKENS)[None])
        try:
            model(**given, use_cache=True, **cache_argument(model, cache))
        except ModelError:
            raise
        except _REFUSALS as error:
            raise ModelError(
                f"{name} does not run on {_PROBED_TOKENS} tokens with a cache of keys and values: "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
    return dict(sorted(found.items()))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


@contextmanager
def _running(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules whose forward is running, the innermost last."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in model.modules():
            # Ours come first and last, so that other hooks are within.
            handle = module.register_forward_pre_hook(enter, prepend=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield running


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of every layer that hands keys and values to a cache, by layer index, in order."""
    return {index: layer.module for index, layer in held_layers(model).items()}


def coded_layers(model: PreTrainedModel) -> list[HeldLayer | None]:
    """One entry for each layer of the cache that transformers makes for the model: what it hands over where that can be
    coded, None where it is to stay as it is.

    Raises:
        ModelError: a model with multi-head latent attention, one whose encoder reads no text, or one without keys and
            values that can be coded.
    """
    name = type(model).__name__
    if not reads_text(model):
        raise ModelError(
            f"{name} needs {model.main_input_name!r} for its encoder, and calibration gives a model nothing but text; "
            f"calibrate a model whose encoder reads text"
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}): its cache holds "
            "one latent vector per token, already compressed, and not keys and values per head"
        )
    held = held_layers(model)
    n_layers = len(stock_layers(model.config))
    if beyond := [layer for layer in held if layer >= n_layers]:
        raise ModelError(
            f"{name}: layers {beyond} hand keys and values to the cache, which has {n_layers} layers by the model's "
            f"config"
        )
    kinds = layer_kinds(model.config, n_layers)
    layers = [held.get(layer) if kind.is_coded else None for layer, kind in enumerate(kinds)]
    if not any(layers):
        why = (
            "hands no keys and values to a cache"
            if not held
            else "caches more than keys and values in every layer"
        )
        raise ModelError(
            f"{name} {why}, so there is nothing to code: an encoder, or a model whose layers keep states of other kinds"
        )
    if all(getattr(layer.module, "is_causal", True) is False for layer in layers if layer is not None):
        raise ModelError(f"{name} is not causal (an encoder), so it has no cache that grows")
    return layers


def check_supported(model: PreTrainedModel) -> None:
    """Accept models with layers whose keys and values can be coded.

    Raises:
        ModelError: for anything else, with the reason; see `coded_layers`.
    """
    coded_layers(model)
