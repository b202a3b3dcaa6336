"""Passes through a decoder that begin at a layer in the middle: what comes before is known from an earlier pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..given_model import decoder_inputs
from .layer_probe import attention_modules


class Replay:
    """One window's exact pass, of which any number of first layers can be given again instead of computed.

    A decoder whose later layers read more than the layer before them is always computed in full: one that shares keys
    and values says so in its config, any other shows in its logits.

    Args:
        model: a decoder in evaluation mode.
        ids: [T] of the window.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._layers = _decoder_layers(model)
        self._outputs: list[Any] = []
        hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]
        inputs = decoder_inputs(model, ids[None])
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        with self.before(len(self._layers) // 2):
            again = model(**inputs, use_cache=False).logits
        if not torch.equal(logits, again):
            self._layers = []

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs.append(output)

    @contextmanager
    def before(self, n_layers: int) -> Iterator[None]:
        """Inside the ``with`` block the first layers are not computed."""
        replaced = self._layers[:n_layers]
        own = [vars(layer).get("forward") for layer in replaced]
        try:
            for layer, output in zip(replaced, self._outputs, strict=False):
                layer.forward = _giving(output)
            yield
        finally:
            for layer, forward in zip(replaced, own, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = forward


def _giving(output: Any) -> Any:
    """A forward pass that gives a copy of the output: who reads it may write to it."""

    def forward(*_: Any, **__: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].clone(), *output[1:])
        return output.clone()

    return forward


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in order, those of the cache each with its attention module; empty where there is no such
    list.
    """
    attention = attention_modules(model)
    if getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return []
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) > max(attention):
            pairs = ((modules[index], wanted) for index, wanted in attention.items())
            if all(any(inner is wanted for inner in layer.modules()) for layer, wanted in pairs):
                return list(modules)
    return []
