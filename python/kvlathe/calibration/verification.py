"""Whether a preset keeps its promise on a user's own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PresetError
from ..given_model import transformers_model
from ..preset import Preset
from .basis import CalibrationOptions
from .quality import Evaluator
from .text.corpus import Document
from .text.token_windows import windows
from .text.window_length import check_model_reads, check_reads_coded
from .tuning import CurvePoint, TuneOptions, measure


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        point: quality on the text, with bounds; ``point.within`` says whether the promise holds.
        target_ppl_delta, target_kld: the promise; None for what was not promised.
        confidence: of the bounds.
    """

    point: CurvePoint
    target_ppl_delta: float | None
    target_kld: float | None
    confidence: float

    @property
    def holds(self) -> bool:
        """Whether the bounds of all that was promised are within it."""
        return self.point.within


def _promised(measured: dict[str, Any], name: str) -> float | None:
    value = measured.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise PresetError(
            f"the preset promises {name} = {value!r}, expected a number above 0; give it yourself"
        )
    return float(value)


def verify(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    preset: Preset,
    *,
    target_ppl_delta: float | None = None,
    target_kld: float | None = None,
    window: int = 1024,
    n_windows: int = 16,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """Measure a preset on text of the user's, as `tune` measured it.

    Args:
        documents: text that calibration and tuning have not seen.
        target_ppl_delta, target_kld: the promise; without both, the one that the preset carries.
        n_windows: windows of ``window`` tokens; more of them bring the bounds closer to the means.

    Raises:
        PresetError: a preset for another model, one of the seed's kind, or one without a promise when none is given.
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
        BudgetError: a confidence that is none, fewer than two windows.
        ModelError: a model without logits of next tokens.
    """
    model = transformers_model(model)
    preset.check_model(model.config)
    if preset.is_seed_style:
        raise PresetError(
            "seed-style presets carry no promise, and their quality is not measured this way; see kvlathe eval"
        )
    measured = preset.meta["kvlathe"]["measured"] or {}
    if target_ppl_delta is None and target_kld is None:
        target_ppl_delta, target_kld = (
            _promised(measured, name) for name in ("target_ppl_delta", "target_kld")
        )
        if target_ppl_delta is None and target_kld is None:
            raise PresetError(
                "the preset promises nothing (it was not tuned, or set to another rate since); give target_ppl_delta "
                "or target_kld to hold it to"
            )
    calibration = preset.meta["kvlathe"]["calibration"]
    tail = measured.get("tail", calibration.get("tail", CalibrationOptions.tail))
    if not isinstance(tail, int) or isinstance(tail, bool) or tail < 0:
        raise PresetError(f"the preset was measured with a tail of {tail!r}, expected a number of tokens")
    check_model_reads(model.config, window)
    check_reads_coded(window, n_sinks=preset.n_sinks, tail=tail, block_len=preset.block_len)
    options = TuneOptions(
        target_ppl_delta=target_ppl_delta,
        target_kld=target_kld,
        window=window,
        verification_windows=n_windows,
        confidence=confidence,
    )
    text = windows(tokenizer, documents, window, n_windows, seed)
    evaluator = Evaluator(model, text, tail=tail, n_sinks=preset.n_sinks)
    point = measure(evaluator, preset, options, "verifying")
    return Verdict(point, target_ppl_delta, target_kld, confidence)
