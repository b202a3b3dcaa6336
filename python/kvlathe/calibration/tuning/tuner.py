"""From a model and text to a tuned preset: calibrate once, search, verify.

The search looks at the same text again and again and so flatters what it finds; what a preset promises is therefore
measured once more, on text that neither the calibration nor the search saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import BudgetError
from ...given_model import transformers_model
from ...preset import Preset
from ..basis import calibrate
from ..quality import Evaluator
from ..text.corpus import Corpus, halves
from ..text.sampled_text import sampled_windows
from ..text.token_windows import windows
from ..text.window_length import check_model_reads, check_reads_coded
from .budget import CurvePoint, TuneOptions, cannot_be_met
from .measurement import Judge, record
from .search import search_bits, verify_choice


@dataclass(frozen=True)
class TuneResult:
    """The tuned preset.

    Attributes:
        curve: every rate that the search tried, by rising rate.
        best: the one it chose.
        verified: the preset's own rate, on text that the search did not see; above `best` where that failed there.
    """

    preset: Preset
    curve: tuple[CurvePoint, ...]
    best: CurvePoint
    verified: CurvePoint


def tune(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    options: TuneOptions | None = None,
    *,
    name: str = "",
    calibrated: Preset | None = None,
    on_note: Callable[[str], None] | None = None,
    on_point: Callable[[CurvePoint], None] | None = None,
) -> TuneResult:
    """Calibrate a model, find the fewest bits within the budget, and verify them.

    Args:
        model: a decoder with standard attention, or a wrapper around one.
        tokenizer: its tokenizer.
        corpus: text; one part calibrates, another, of other documents, guides the search, a third verifies.
        name: what the preset calls the model.
        calibrated: a preset of this model whose calibration is taken over instead of making one.
        on_note: takes sentences for people.
        on_point: takes every rate as it is tried.

    Raises:
        BudgetError: no rate meets the budget.
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
        CalibrationError, ModelError: see `calibrate`.
        PresetError: `calibrated` belongs to another model.
    """
    options = options or TuneOptions()
    if calibrated is None:
        calibrated = calibrate_on(model, tokenizer, corpus, options, name=name, on_note=on_note)
    return Tuner(model, tokenizer, corpus, calibrated, options).fit(
        options, on_note=on_note, on_point=on_point
    )


def calibrate_on(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    options: TuneOptions,
    *,
    name: str = "",
    on_note: Callable[[str], None] | None = None,
) -> Preset:
    """`calibrate` on a corpus's calibration side and on what the model writes itself, as many windows of each as
    ``options`` say.

    Raises:
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
        CalibrationError, ModelError: see `calibrate`.
    """
    model = transformers_model(model)
    seed, n_sampled = options.calibration.seed, options.sampled_windows
    # Before the long part, not after it.
    check_model_reads(model.config, options.window)
    settings = options.calibration
    check_reads_coded(
        options.window, n_sinks=settings.n_sinks, tail=settings.tail, block_len=settings.block_len
    )
    n_read = options.calibration_windows - n_sampled
    text = windows(tokenizer, corpus.calibration, options.window, n_read, seed) if n_read else []
    text_name = corpus.name
    if n_sampled:
        # Costs are measured on text that was read, the first window: the model's own is too unlike any other.
        settings = replace(settings, cost_windows=min(settings.cost_windows, 1 if n_read else 0))
        text += sampled_windows(model, tokenizer, options.window, n_sampled, seed=seed)
        text_name = f"{corpus.name} and the model's own" if n_read else "the model's own"
    return calibrate(model, text, name=name, text_name=text_name, options=settings, on_note=on_note)


class Tuner:
    """Finds rates for budgets: one calibration and one text; what was measured for one budget serves the next.

    Args:
        corpus: its held-out part is split, by document, in text for the search and text to verify on.
        calibrated: a preset of this model; its rate does not matter.
        options: how much text, which tail; budgets are those of `fit`.

    Raises:
        PresetError: `calibrated` belongs to another model.
        CorpusError: too little text.
        EvaluationError: windows that the model does not read, or in which no query sees coded tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        corpus: Corpus,
        calibrated: Preset,
        options: TuneOptions,
    ) -> None:
        model = transformers_model(model)
        calibrated.check_model(model.config)
        check_model_reads(model.config, options.window)
        check_reads_coded(
            options.window,
            n_sinks=calibrated.n_sinks,
            tail=options.calibration.tail,
            block_len=calibrated.block_len,
        )
        self._calibrated, self._text_name = calibrated, corpus.name
        seed, tail = options.calibration.seed, options.calibration.tail
        sides = halves(corpus.held_out, seed=seed)
        n_windows = (options.evaluation_windows, options.verification_windows)
        self._search, self._verification = (
            Judge(
                Evaluator(
                    model,
                    windows(tokenizer, side, options.window, n, seed),
                    tail=tail,
                    n_sinks=calibrated.n_sinks,
                )
            )
            for side, n in zip(sides, n_windows, strict=True)
        )

    def fit(
        self,
        options: TuneOptions,
        *,
        on_note: Callable[[str], None] | None = None,
        on_point: Callable[[CurvePoint], None] | None = None,
    ) -> TuneResult:
        """The fewest bits within the budget of ``options``, verified; see `tune`.

        Raises:
            BudgetError: no rate meets the budget.
        """

        def trying(text: Judge, verb: str) -> Callable[[Preset], CurvePoint]:
            def try_bits(candidate: Preset) -> CurvePoint:
                point = text.point(candidate, options, f"{verb} {candidate.bits_per_value:.2f} bits")
                if on_point is not None:
                    on_point(point)
                return point

            return try_bits

        best, curve = search_bits(self._calibrated, trying(self._search, "trying"))
        if best is None:
            raise BudgetError(cannot_be_met(curve[-1], options))
        if on_note is not None:
            on_note("verifying on text that the search did not see")
        tuned, verified = verify_choice(self._calibrated, best, trying(self._verification, "verifying"))
        if not verified.within:
            raise BudgetError(cannot_be_met(verified, options))
        tuned = tuned.with_measured(record(verified, curve, self._text_name, options))
        return TuneResult(tuned, tuple(curve), best, verified)
