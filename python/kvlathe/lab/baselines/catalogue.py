"""The baselines by name, and how each is made for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from ...calibration.rope_probe import ProbeResult
from ...errors import EvaluationError
from ..evaluation.run import windows_digest
from .baseline import Baseline
from .hugging_face import HuggingFace
from .kivi import Kivi
from .kvquant import KvQuant
from .llama_cpp import LlamaCpp, RotatedLlamaCpp
from .rank_int8 import RankInt8
from .sample import LayerSample, collect
from .turboquant import TurboQuant


class Subject:
    """A model that baselines are made for, and the text for those that are calibrated.

    Args:
        model: a decoder with standard attention.
        probe: its cache's shape and rotations.
        n_sinks: first tokens that stay exact, and are no part of what calibrated baselines see.
        windows: gives LongTensors [T] of calibration text; asked when the first calibrated baseline runs, once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probe: ProbeResult,
        n_sinks: int,
        windows: Callable[[], Sequence[Tensor]],
    ) -> None:
        self.model = model
        self.probe = probe
        self.shape = probe.shape
        self._n_sinks = n_sinks
        self._make_windows = windows

    @cached_property
    def _windows(self) -> Sequence[Tensor]:
        return self._make_windows()

    @cached_property
    def sample(self) -> list[LayerSample]:
        """Keys and values of the calibration text, by layer."""
        return collect(self.model, self._windows, self.probe, self._n_sinks)

    @cached_property
    def text_digest(self) -> str:
        return windows_digest(self._windows)


_MAKERS: dict[str, Callable[[Subject], Baseline]] = {
    "q8_0": lambda of: LlamaCpp(of.shape, 8),
    "q4_0": lambda of: LlamaCpp(of.shape, 4),
    "q4_0-hadamard": lambda of: RotatedLlamaCpp(of.shape, 4),
    "kivi-4": lambda of: Kivi(of.shape, 4),
    "kivi-2": lambda of: Kivi(of.shape, 2),
    "turboquant-4": lambda of: TurboQuant(of.shape, 4),
    "turboquant-3": lambda of: TurboQuant(of.shape, 3),
    "turboquant-2": lambda of: TurboQuant(of.shape, 2),
    "kvquant-4": lambda of: KvQuant(of.probe, 4, lambda: of.sample, of.text_digest),
    "kvquant-3": lambda of: KvQuant(of.probe, 3, lambda: of.sample, of.text_digest),
    "kvquant-2": lambda of: KvQuant(of.probe, 2, lambda: of.sample, of.text_digest),
    "rank-int8-v": lambda of: RankInt8(of.shape, ("value",), lambda: of.sample, of.text_digest),
    "rank-int8-kv": lambda of: RankInt8(of.shape, ("key", "value"), lambda: of.sample, of.text_digest),
    "hf-fp8": lambda of: HuggingFace(of.model, of.shape, "fp8", 8),
    "hf-quanto-4": lambda of: HuggingFace(of.model, of.shape, "quanto", 4),
    "hf-quanto-2": lambda of: HuggingFace(of.model, of.shape, "quanto", 2),
    "hf-hqq-4": lambda of: HuggingFace(of.model, of.shape, "hqq", 4),
    "hf-hqq-2": lambda of: HuggingFace(of.model, of.shape, "hqq", 2),
}

#: Names of all baselines, in the order of tables.
NAMES: tuple[str, ...] = tuple(_MAKERS)


def make(name: str, subject: Subject) -> Baseline:
    """The baseline of that name.

    Raises:
        EvaluationError: no such baseline, or one that cannot run here (the message says why).
    """
    if name not in _MAKERS:
        raise EvaluationError(f"there is no baseline {name!r}; there are {', '.join(NAMES)}")
    return _MAKERS[name](subject)
