"""The evaluator against reality: a stock model that is fed token by token from a cache built by hand, and the real
cache fed in chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cache_helpers import TAIL, compressed_cache, low_rank, model_of, preset_of, tokens
from kvlathe import CompressedDynamicCache, Evaluator, IdentityCompressor, Quality
from kvlathe.calibration.quality import coders
from kvlathe.compressors import StreamSetCompressor, granularity

N_SINKS = 4
# Half-split RoPE, sliding window, partial interleaved RoPE, no RoPE, two kinds of layers.
NAMES = ["llama", "mistral", "glm", "gpt2", "gemma3"]


class ByHand(DynamicLayer):
    """Takes one token at a time, keeps everything exact, and shows the query far tokens as the codec gives them back.

    A token is far when it is at least ``TAIL`` tokens older than the query and no sink. As the tail is longer than a
    block, all tokens of a far token's block have been seen.
    """

    def __init__(self, compressors: tuple[Any, Any]) -> None:
        super().__init__()
        self._compressors = compressors

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert key_states.shape[2] == 1
        exact = super().update(key_states, value_states)
        keys, values = (self._mix(c, x) for c, x in zip(self._compressors, exact, strict=True))
        return keys, values

    def _mix(self, compressor: Any, x: Tensor) -> Tensor:
        query = x.shape[2] - 1
        far_end = query - TAIL + 1
        if far_end <= N_SINKS or isinstance(compressor, IdentityCompressor):
            return x
        block_len = granularity(compressor)
        n_coded = math.ceil(far_end / block_len) * block_len
        coded = x[:, :, :n_coded].clone()
        assert coded.shape[2] == n_coded
        if isinstance(compressor, StreamSetCompressor):
            # Blocks begin at multiples of their length; sinks are zero in the first.
            coded[:, :, :N_SINKS] = 0.0
            coded = compressor.expand(compressor.compress(coded, 0), 0, x.dtype)
        else:
            coded = compressor.expand(compressor.compress(coded), x.dtype)
        return torch.cat([x[:, :, :N_SINKS], coded[:, :, N_SINKS:far_end], x[:, :, far_end:]], dim=2)


def _by_hand(cache: CompressedDynamicCache) -> DynamicCache:
    made = DynamicCache()
    made.layers = [
        ByHand((cache.compressor(layer, "key"), cache.compressor(layer, "value")))
        for layer in range(len(cache.layers))
    ]
    made.layer_class_to_replicate = None
    return made


@torch.no_grad()
def _fed(model: PreTrainedModel, cache: DynamicCache, window: Tensor, chunk: int) -> Tensor:
    """Logits [T, V] of a window fed in chunks."""
    parts = [model(ids[None], past_key_values=cache).logits[0] for ids in window.split(chunk)]
    return torch.cat(parts)


def _kld(exact: Tensor, other: Tensor) -> Tensor:
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def _exact(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(window[None]).logits[0]


def _windows(n: int, length: int) -> list[Tensor]:
    return [tokens(length, seed=100 + i)[0] for i in range(n)]


def _evaluate(
    model: PreTrainedModel, cache: CompressedDynamicCache, windows: list[Tensor], **kwargs: Any
) -> Quality:
    return Evaluator(model, windows, tail=TAIL, n_sinks=N_SINKS, **kwargs).run(*coders(cache))


def _compare_with_brute_force(model: PreTrainedModel, cache: CompressedDynamicCache) -> None:
    windows = _windows(2, 90)
    klds, nll, exact_nll, n_scored, same = [], 0.0, 0.0, 0, 0
    for window in windows:
        exact, streamed = _exact(model, window), _fed(model, _by_hand(cache), window, 1)
        klds.append(_kld(exact, streamed))
        same += int((exact.argmax(-1) == streamed.argmax(-1)).sum())
        for logits, name in ((streamed, "coded"), (exact, "exact")):
            log_p = logits[:-1].double().log_softmax(-1)
            total = -float(log_p.gather(1, window[1:, None]).sum())
            nll, exact_nll = (nll + total, exact_nll) if name == "coded" else (nll, exact_nll + total)
        n_scored += len(window) - 1
    kld = torch.cat(klds)
    quality = _evaluate(model, cache, windows, max_kept_bytes=0)
    assert quality.kld > 1e-5  # otherwise this compares nothing
    assert quality.kld == pytest.approx(float(kld.mean()), rel=1e-4)
    assert quality.kld_p99 == pytest.approx(float(kld.quantile(0.99)), rel=1e-3)
    assert quality.kld_median == pytest.approx(float(kld.quantile(0.5)), rel=1e-2)
    assert quality.kld_max == pytest.approx(float(kld.max()), rel=1e-3)
    # 90 positions in runs of 3, which is the least that 32 runs can cover.
    assert quality.position_bin == 3
    by_position = torch.stack(klds).mean(0).view(30, 3).mean(1)
    assert quality.kld_by_position == pytest.approx(by_position.tolist(), rel=1e-3, abs=1e-6)
    assert quality.kld_by_window == pytest.approx([float(k.mean()) for k in klds], rel=1e-3)
    assert quality.perplexity == pytest.approx(math.exp(nll / n_scored), rel=1e-5)
    assert quality.exact_perplexity == pytest.approx(math.exp(exact_nll / n_scored), rel=1e-5)
    assert quality.ppl_delta == pytest.approx(math.exp((nll - exact_nll) / n_scored) - 1, abs=1e-5)
    assert quality.n_positions == len(kld)
    assert quality.top1 == same / len(kld)


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluator_equals_brute_force(name: str) -> None:
    # Without the model's config: by hand every layer keeps its sinks and all tokens.
    cache = CompressedDynamicCache.from_preset(preset_of(name, 3.0), uncompressed_tail=0)
    _compare_with_brute_force(model_of(name), cache)


def test_the_evaluator_equals_brute_force_for_the_seeds_compressor() -> None:
    cache = CompressedDynamicCache([IdentityCompressor()] * 2, [low_rank(rank=14)] * 2, 2)
    for layer in cache.layers:  # the evaluator asks the cache how many sinks there are
        layer.policy = type(layer.policy)(N_SINKS, 0, 0)
    _compare_with_brute_force(model_of("llama"), cache)


def test_kept_distributions_are_precise_enough() -> None:
    """Exact distributions kept in float16 against those computed afresh."""
    model, cache, windows = model_of("llama"), compressed_cache("llama", 3.0), _windows(2, 90)
    evaluator = Evaluator(model, windows, tail=TAIL, n_sinks=N_SINKS)
    first, again = (evaluator.run(*coders(cache)) for _ in range(2))
    assert first == again
    afresh = _evaluate(model, cache, windows, max_kept_bytes=0)
    assert first.kld == pytest.approx(afresh.kld, rel=0.01)
    assert first.exact_perplexity == pytest.approx(afresh.exact_perplexity, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_an_exact_cache_costs_nothing(name: str) -> None:
    model = model_of(name)
    quality = Evaluator(model, _windows(1, 60), tail=TAIL, max_kept_bytes=0).run(None, None)
    assert quality.kld < 1e-6  # what rounding in float32 leaves
    assert quality.top1 == 1.0
    assert abs(quality.ppl_delta) < 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("name", ["llama", "glm", "gemma3"])
def test_the_evaluator_is_conservative(name: str, chunk: int) -> None:
    """The real cache loses no more than the evaluator says.

    Whatever the chunks, a query of the real cache reads exactly all that the evaluator's query does and more: tokens
    leave the tail in whole blocks only, so it holds up to a block less one above its length, the query's own token
    comes on top, and within a chunk nothing is coded. Fewer coded tokens mean a smaller error, though not at every
    position: two errors may cancel, and dropping one of them then leaves more. Over some hundred positions such luck
    is worth some percent, and 10 % is what we allow.
    """
    model = model_of(name)
    windows = _windows(4, 120)
    cache = compressed_cache(name, 3.0)
    quality = _evaluate(model, cache, windows)
    klds = []
    for window in windows:
        cache.reset()
        klds.append(_kld(_exact(model, window), _fed(model, cache, window, chunk)))
        assert cache.get_memory_stats()["compressed_tokens"] == (120 - TAIL) // 8 * 8 - N_SINKS
    real = float(torch.cat(klds).mean())
    assert 0.0 < real <= 1.1 * quality.kld
    if chunk == 1:
        # And not by a wide margin: only the incomplete block makes the difference, in layers that code anything. A
        # window of 24 tokens leaves 7 beyond the tail, which are no block; the evaluator takes them for coded.
        sides = (
            [
                cache.compressor(at, side) if layer.n_coded else IdentityCompressor()
                for at, layer in enumerate(cache.layers)
            ]
            for side in ("key", "value")
        )
        coding = CompressedDynamicCache(*sides, len(cache.layers), uncompressed_tail=TAIL)
        assert real >= 0.5 * _evaluate(model, coding, windows).kld


def test_a_longer_tail_costs_less() -> None:
    model, cache, windows = model_of("llama"), compressed_cache("llama", 2.0), _windows(2, 100)
    klds = [
        Evaluator(model, windows, tail=tail, n_sinks=N_SINKS).run(*coders(cache)).kld for tail in (8, 32, 80)
    ]
    assert klds[0] > klds[1] > klds[2] > 0.0


def test_nothing_far_nothing_lost() -> None:
    model, cache = model_of("llama"), compressed_cache("llama", 2.0)
    quality = _evaluate(model, cache, _windows(1, TAIL + N_SINKS), max_kept_bytes=0)
    assert quality.kld < 1e-6  # what rounding in float32 leaves
