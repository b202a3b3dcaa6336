"""How each cache holds a text that a question is then asked about.

Ours are the caches that users run: `CompressedDynamicCache` with its tail, the text read in chunks
(``prefill_chunk_size``), so that each chunk attends to what is coded already. Baselines have no cache class:
the text is read with the exact cache, and what the baseline would hold is then put in its place. Their text has
attended exactly, ours has not, which favours baselines. From the question on both are alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...cache import CompressedDynamicCache
from ...calibration.quality.coders import with_coded
from ...calibration.rope_probe import ModelShape
from ...given_model import cache_argument
from ...preset import Preset, Side
from ..evaluation import Method, PresetMethod, cache_size

PREFILL_CHUNK_TOKENS = 512


def read(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Let the model read tokens into a cache, in chunks.

    Args:
        ids: [T] on the model's device, at least one; they follow what the cache holds.

    Returns:
        [vocabulary] logits after the last token.
    """
    given = cache_argument(model, cache)
    for chunk in ids.split(PREFILL_CHUNK_TOKENS):
        # The logits of all positions would take more memory than all else.
        out = model(input_ids=chunk[None], use_cache=True, logits_to_keep=1, **given)
    logits: Tensor = out.logits[0, -1]
    return logits


class Context:
    """A text that several caches hold in turn.

    Args:
        ids: [T] on the model's device.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model = model
        self.ids = ids

    @cached_property
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, n_kv_heads, T, head_dim] by layer, not to be changed; computed once for all caches."""
        cache = DynamicCache()
        read(self.model, self.ids, cache)
        layers: list[Any] = list(cache.layers)
        return [(layer.keys, layer.values) for layer in layers]


class Holder(ABC):
    """A cache that holds a text.

    Attributes:
        name: for people, and unique in a comparison.
        family: results of one family differ in their rate only.
        identity: all that its answers depend on besides model and prompt.
        effort: work compared with reading the text once, for the time left.
    """

    name: str
    family: str
    identity: str
    effort: float

    @abstractmethod
    def hold(self, context: Context, n_later: int) -> DynamicCache:
        """A cache that holds the context, and may be changed.

        Args:
            n_later: tokens of the question, which come before the answer is read.
        """

    @abstractmethod
    def bits(self, n_tokens: int) -> tuple[float, float]:
        """Bits a value of the whole cache of so many tokens, and of its coded part alone."""


class ExactHolder(Holder):
    """transformers' `DynamicCache`."""

    name = "exact"
    family = "exact"
    identity = "exact"
    effort = 1.0

    def hold(self, context: Context, n_later: int) -> DynamicCache:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(context.exact):
            # An empty layer concatenates, so the original is not touched.
            cache.update(keys, values, layer)
        return cache

    def bits(self, n_tokens: int) -> tuple[float, float]:
        return 16.0, 16.0


class PresetHolder(Holder):
    """`CompressedDynamicCache` with a preset.

    Args:
        preset: at the rate to be measured.
        tail: latest tokens that stay exact.
        label: see `PresetMethod`.

    Raises:
        EvaluationError: a calibration without a rate.
    """

    effort = 1.0

    def __init__(self, preset: Preset, shape: ModelShape, tail: int, label: str = "") -> None:
        method = PresetMethod(preset, shape, label)
        self.name, self.family = method.name, method.family
        self.identity = f"{method.identity}, tail {tail}"
        self._preset, self._method, self._shape, self._tail = preset, method, shape, tail

    def hold(self, context: Context, n_later: int) -> DynamicCache:
        cache = CompressedDynamicCache.from_preset(self._preset, uncompressed_tail=self._tail)
        read(context.model, context.ids, cache)
        return cache

    def bits(self, n_tokens: int) -> tuple[float, float]:
        n_sinks = self._preset.n_sinks
        size = cache_size(self._method, self._shape, n_tokens, n_sinks=n_sinks, tail=self._tail)
        return size.bits_per_value, size.coded_bits


class CodedHolder(Holder):
    """What a method reads back of a text that was read exactly.

    Coded are whole groups from the first token after the sinks on, up to the tail that is left when the answer is read;
    the tail does not move while it is.

    Args:
        method: codes the text.
        n_sinks, tail: first and latest tokens that stay exact.
    """

    # The text is read once for all of them, and one of them is coded in a fraction of that.
    effort = 0.15

    def __init__(self, method: Method, shape: ModelShape, n_sinks: int, tail: int) -> None:
        self.name, self.family = method.name, method.family
        self.identity = f"{method.identity} after exact reading, sinks {n_sinks}, tail {tail}"
        self._method, self._shape, self._n_sinks, self._tail = method, shape, n_sinks, tail

    def hold(self, context: Context, n_later: int) -> DynamicCache:
        n_text = len(context.ids)
        end = min(n_text, n_text + n_later - self._tail)
        n_coded = self._method.coded_end(self._n_sinks, end) - self._n_sinks
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(context.exact):
            coded_keys = self._read_back(layer, "key", keys, n_coded)
            coded_values = self._read_back(layer, "value", values, n_coded)
            cache.update(coded_keys, coded_values, layer)
        return cache

    def _read_back(self, layer: int, side: Side, x: Tensor, n_coded: int) -> Tensor:
        start = self._n_sinks
        # Methods are written for float32, whatever the model computes in.
        return with_coded(
            x, start, start + n_coded, lambda run: self._method.code(layer, side, run.float(), start)
        )

    def bits(self, n_tokens: int) -> tuple[float, float]:
        size = cache_size(self._method, self._shape, n_tokens, n_sinks=self._n_sinks, tail=self._tail)
        return size.bits_per_value, size.coded_bits


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel, cache: DynamicCache, question: Tensor, answer: Tensor
) -> tuple[list[float], bool]:
    """How a model that holds a text answers a question about it, fed token by token as in `generate`.

    Args:
        cache: holds the text; afterwards the question and all but the last token of the answer, too.
        question, answer: [T] ids, at least one each.

    Returns:
        The natural logarithm of the probability of each token of the answer, those before it given, and whether greedy
        decoding gives the answer: it does if and only if every one of them is the most likely.
    """
    found = True
    log_probs = []
    logits = read(model, question, cache)
    for at, token in enumerate(answer.tolist()):
        log_probs.append(float(logits.float().log_softmax(-1)[token]))
        found = found and int(logits.argmax()) == token
        if at + 1 < len(answer):
            logits = read(model, answer[at : at + 1], cache)
    return log_probs, found
