"""The model and the text that a command's arguments name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.rope_probe import ProbeResult
    from ..calibration.text.corpus import Corpus
    from ..model_loading import LoadedModel


def model_and_text(arguments: argparse.Namespace) -> tuple[LoadedModel, Corpus]:
    """What ``--model``, ``--device``, ``--dtype`` and ``--text`` (or the default corpus) name.

    A seed chooses windows, never the sides of the default corpus: what one command has calibrated on, none judges on.

    Raises:
        DeviceError, CorpusError, ModelError: they cannot be had. The model comes last: it takes longest.
    """
    import torch

    from ..calibration.text.corpus import corpus_from_files, default_corpus
    from ..devices import available_device
    from ..model_loading import load_model

    device = available_device(arguments.device)
    corpus = corpus_from_files(arguments.text) if arguments.text else default_corpus()
    return load_model(arguments.model, device=device, dtype=getattr(torch, arguments.dtype)), corpus


def probed(model: PreTrainedModel) -> ProbeResult:
    """The shape of a model's cache and its rotations; what is strange about them is said."""
    from ..calibration.rope_probe import probe_rope

    probe = probe_rope(model)
    for note in probe.notes:
        say(f"note: {note}")
    return probe
