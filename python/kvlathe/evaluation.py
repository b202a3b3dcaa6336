"""What a cache costs in quality: perplexity, KL divergence and top-1 agreement against the exact cache.

Streaming protocol: every query reads the first ``n_sinks`` tokens and the latest ``tail`` tokens (its own
included) exactly, and every other token as the codec gives it back. One forward pass a window does it, with
`two_sided` attention; `tests/test_streaming.py` holds it against a cache fed token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache import CompressedDynamicCache
from .compressors import StreamSetCompressor, granularity, native_codec
from .progress import progress
from .two_sided import TwoSidedPlan, two_sided

Coder = Callable[[int, Tensor], Tensor]

_ROWS = 128  # positions whose logits are compared at once


@dataclass(frozen=True)
class Quality:
    """A compressed cache against the exact one, over all positions of all windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text with the compressed cache.
        exact_perplexity: the same with the exact cache.
        kld: mean KL divergence of the next-token distribution from the exact cache's, in nats.
        kld_p99: 99th percentile over positions of the same.
        top1: share of positions where both caches find the same most likely token.
        n_positions: positions compared.
        kld_by_window: mean KLD of each window, for confidence intervals.
        log_ratio_by_window: mean change of the negative log-likelihood of each window, in nats.
    """

    perplexity: float
    exact_perplexity: float
    kld: float
    kld_p99: float
    top1: float
    n_positions: int
    kld_by_window: tuple[float, ...]
    log_ratio_by_window: tuple[float, ...]

    @property
    def ppl_delta(self) -> float:
        """Relative change of perplexity: 0.05 means +5 %."""
        return self.perplexity / self.exact_perplexity - 1.0


class Evaluator:
    """Compares caches on fixed windows; the exact cache's distributions are computed once.

    The exact log-probabilities are kept in float16 (n_positions × vocabulary × 2 bytes) when they fit
    ``max_kept_bytes``, and recomputed for each comparison otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[Tensor],
        *,
        tail: int = 128,
        n_sinks: int = 4,
        max_kept_bytes: int = 4 << 30,
    ) -> None:
        self._model = model
        self._windows = list(windows)
        self._tail = tail
        self._n_sinks = n_sinks
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        n_positions = sum(len(window) for window in self._windows)
        self._keeps = n_positions * vocabulary * 2 <= max_kept_bytes
        self._exact: list[Tensor] = []

    @torch.no_grad()
    def _exact_logits(self, at: int) -> Tensor:
        if at < len(self._exact):
            return self._exact[at]
        logits = self._model(
            input_ids=self._windows[at][None].to(self._model.device), use_cache=False
        ).logits[0]
        if self._keeps:
            # Differences of logits decide, so the largest goes to zero before rounding.
            kept = (logits - logits.max(dim=-1, keepdim=True).values).to(torch.float16)
            self._exact.append(kept)
            return kept
        return logits

    @torch.no_grad()
    def run(self, code_keys: Coder | None, code_values: Coder | None, what: str = "evaluating") -> Quality:
        """Measure one cache, given as what its codec makes of a layer's keys and values.

        Args:
            code_keys: ``(layer, k[B, n_kv_heads, T, D]) -> k_hat``; None leaves keys exact.
            code_values: the same for values.
        """
        plan = TwoSidedPlan(
            tail=self._tail, n_sinks=self._n_sinks, code_keys=code_keys, code_values=code_values
        )
        was_training = self._model.training
        self._model.eval()
        klds: list[Tensor] = []
        nll = exact_nll = 0.0
        same = scored = 0
        log_ratios: list[float] = []
        try:
            for at in progress(range(len(self._windows)), what, "window"):
                exact = self._exact_logits(at)
                with two_sided(self._model, plan):
                    ids = self._windows[at][None].to(self._model.device)
                    coded = self._model(input_ids=ids, use_cache=False).logits[0]
                window = _compare(exact, coded, self._windows[at].to(coded.device))
                klds.append(window.kld)
                nll += window.nll
                exact_nll += window.exact_nll
                same += window.same
                scored += len(coded) - 1
                log_ratios.append((window.nll - window.exact_nll) / (len(coded) - 1))
        finally:
            self._model.train(was_training)
        kld = torch.cat(klds)
        return Quality(
            perplexity=math.exp(nll / scored),
            exact_perplexity=math.exp(exact_nll / scored),
            kld=float(kld.mean()),
            kld_p99=float(kld.quantile(0.99))
            if len(kld) < 1 << 23
            else float(kld[:: len(kld) >> 22].quantile(0.99)),
            top1=same / len(kld),
            n_positions=len(kld),
            kld_by_window=tuple(float(window.mean()) for window in klds),
            log_ratio_by_window=tuple(log_ratios),
        )


@dataclass
class _Window:
    kld: Tensor
    nll: float
    exact_nll: float
    same: int


def _compare(exact: Tensor, coded: Tensor, ids: Tensor) -> _Window:
    """KLD at every position and NLL of every next token, a few rows of logits at a time."""
    klds = []
    nll = exact_nll = 0.0
    same = 0
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        p = exact[rows].to(torch.float32).log_softmax(-1)
        q = coded[rows].to(torch.float32).log_softmax(-1)
        klds.append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        targets = ids[start + 1 : start + 1 + len(p), None]
        n = len(targets)
        nll -= float(q[:n].gather(1, targets).sum(dtype=torch.float64))
        exact_nll -= float(p[:n].gather(1, targets).sum(dtype=torch.float64))
    return _Window(torch.cat(klds), nll, exact_nll, same)


def upper_bound(
    samples: Iterable[float], *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> float:
    """One-sided bootstrap bound on the mean: below it with the given confidence (Efron's percentile method)."""
    values = torch.tensor(list(samples), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    return float(values[draws].mean(dim=1).quantile(confidence))


def coders(cache: CompressedDynamicCache) -> tuple[Coder, Coder]:
    """What an (empty) cache's compressors make of keys and of values: the arguments of `Evaluator.run`.

    Tokens are coded from the first one after the sinks on, in whole blocks; an incomplete last block, which a cache
    would keep in its tail, stays exact.
    """
    return (
        lambda layer, x: _through(cache.compressor(layer, "key"), cache.n_sinks(layer), x),
        lambda layer, x: _through(cache.compressor(layer, "value"), cache.n_sinks(layer), x),
    )


def _through(compressor: nn.Module, n_sinks: int, x: Tensor) -> Tensor:
    if native_codec(compressor) is None:
        return x
    n_tokens = (x.shape[2] - n_sinks) // granularity(compressor) * granularity(compressor)
    if n_tokens <= 0:
        return x
    middle = x[:, :, n_sinks : n_sinks + n_tokens].contiguous()
    if isinstance(compressor, StreamSetCompressor):
        coded = compressor.expand(compressor.compress(middle, n_sinks), n_sinks, x.dtype)
    else:
        expand: Callable[..., Tensor] = compressor.expand  # type: ignore[assignment]
        coded = expand(compressor.compress(middle)).to(x.dtype)  # type: ignore[operator]
    return torch.cat([x[:, :, :n_sinks], coded, x[:, :, n_sinks + n_tokens :]], dim=2)
