"""What a cache costs in quality: perplexity, KL divergence and top-1 agreement against the exact cache.

Streaming protocol: every query reads the first ``n_sinks`` tokens and the latest ``tail`` tokens (its own
included) exactly, and every other token as the codec gives it back. One forward pass a window does it, with
`two_sided` attention; `tests/test_streaming.py` holds it against a cache fed token by token. With no sinks and no
tail every query reads every token coded, its own included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...given_model import check_predicts_tokens, decoder_inputs, evaluation_mode, transformers_model
from ...progress import progress
from .two_sided import TwoSidedPlan, two_sided
from .two_sided_kernel import Coder

_ROWS = 128  # positions whose logits are compared at once
_POSITION_BINS = 32  # KLD by position is kept as the means of this many runs of positions


@dataclass(frozen=True)
class Quality:
    """A compressed cache against the exact one, over all positions of all windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text with the compressed cache.
        exact_perplexity: the same with the exact cache.
        kld: mean KL divergence of the next-token distribution from the exact cache's, in nats.
        kld_median, kld_p99, kld_max: median, 99th percentile and largest over positions of the same.
        top1: share of positions where both caches find the same most likely token.
        n_positions: positions compared.
        kld_by_window: mean KLD of each window, for confidence intervals.
        log_ratio_by_window: mean change of the negative log-likelihood of each window, in nats.
        kld_by_position: mean KLD of runs of ``position_bin`` positions, from the first on, over all windows.
        position_bin: positions of a run; the last one may be shorter.
    """

    perplexity: float
    exact_perplexity: float
    kld: float
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: float
    n_positions: int
    kld_by_window: tuple[float, ...]
    log_ratio_by_window: tuple[float, ...]
    kld_by_position: tuple[float, ...]
    position_bin: int

    @property
    def ppl_delta(self) -> float:
        """Relative change of perplexity: 0.05 means +5 %."""
        return self.perplexity / self.exact_perplexity - 1.0

    def kld_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided bootstrap interval of `kld` over windows, in nats."""
        return interval(self.kld_by_window, confidence=confidence)

    def ppl_delta_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided bootstrap interval of `ppl_delta` over windows."""
        low, high = interval(self.log_ratio_by_window, confidence=confidence)
        return math.expm1(low), math.expm1(high)


class Evaluator:
    """Compares caches on fixed windows; the exact cache's distributions are computed once.

    The exact log-probabilities are kept in float16 (n_positions × vocabulary × 2 bytes) when they fit
    ``max_kept_bytes``, and recomputed for each comparison otherwise.

    Raises:
        ModelError: a model without logits of next tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Sequence[Tensor],
        *,
        tail: int = 128,
        n_sinks: int = 4,
        max_kept_bytes: int = 4 << 30,
    ) -> None:
        self._model = transformers_model(model)
        check_predicts_tokens(self._model)
        self._windows = list(windows)
        self._tail = tail
        self._n_sinks = n_sinks
        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        n_positions = sum(len(window) for window in self._windows)
        self._keeps = n_positions * vocabulary * 2 <= max_kept_bytes
        self._exact: list[Tensor] = []

    @torch.no_grad()
    def _exact_logits(self, at: int) -> Tensor:
        if at < len(self._exact):
            return self._exact[at]
        given = decoder_inputs(self._model, self._windows[at][None])
        logits = self._model(**given, use_cache=False).logits[0]
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
        klds: list[Tensor] = []
        nll = exact_nll = 0.0
        same = scored = 0
        log_ratios: list[float] = []
        with evaluation_mode(self._model):
            for at in progress(range(len(self._windows)), what, "window"):
                exact = self._exact_logits(at)
                with two_sided(self._model, plan) as inputs:
                    given = decoder_inputs(self._model, self._windows[at][None])
                    coded = self._model(**given, **inputs()).logits[0]
                window = _compare(exact, coded, self._windows[at].to(coded.device))
                klds.append(window.kld)
                nll += window.nll
                exact_nll += window.exact_nll
                same += window.same
                scored += len(coded) - 1
                log_ratios.append((window.nll - window.exact_nll) / (len(coded) - 1))
        kld = torch.cat(klds)
        # `quantile` takes no more than 2^24 numbers; beyond that a regular sample has the same percentiles.
        sample = kld if len(kld) < 1 << 23 else kld[:: len(kld) >> 22]
        median, p99 = sample.quantile(torch.tensor([0.5, 0.99])).tolist()
        by_position, position_bin = _by_position(klds)
        return Quality(
            perplexity=math.exp(nll / scored),
            exact_perplexity=math.exp(exact_nll / scored),
            kld=float(kld.mean()),
            kld_median=median,
            kld_p99=p99,
            kld_max=float(kld.max()),
            top1=same / len(kld),
            n_positions=len(kld),
            kld_by_window=tuple(float(window.mean()) for window in klds),
            log_ratio_by_window=tuple(log_ratios),
            kld_by_position=by_position,
            position_bin=position_bin,
        )


def _by_position(klds: Sequence[Tensor]) -> tuple[tuple[float, ...], int]:
    """Mean KLD of equal runs of positions over windows [T] of any lengths, and a run's positions."""
    longest = max(len(window) for window in klds)
    size = -(-longest // _POSITION_BINS)
    n_bins = -(-longest // size)
    total, count = torch.zeros(n_bins, dtype=torch.float64), torch.zeros(n_bins, dtype=torch.float64)
    for window in klds:
        at = torch.arange(len(window)) // size
        total.index_add_(0, at, window.double())
        count.index_add_(0, at, torch.ones(len(window), dtype=torch.float64))
    return tuple((total / count).tolist()), size


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
    return float(_resampled_means(samples, n_resamples, seed).quantile(confidence))


def interval(
    samples: Iterable[float], *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Two-sided bootstrap interval of the mean (Efron's percentile method), equal tails.

    Few samples make it too narrow: with 4 windows, take it for an order of magnitude.
    """
    means = _resampled_means(samples, n_resamples, seed)
    tail = (1 - confidence) / 2
    return float(means.quantile(tail)), float(means.quantile(1 - tail))


def _resampled_means(samples: Iterable[float], n_resamples: int, seed: int) -> Tensor:
    values = torch.tensor(list(samples), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    return values[draws].mean(dim=1)
