"""Which caches a command compares: presets of ours and baselines, by what the user asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .options import count, positive, say

if TYPE_CHECKING:
    from ..calibration.rope_probe import ProbeResult
    from ..calibration.text.corpus import Corpus
    from ..lab.baselines import Baseline, Subject
    from ..model_loading import LoadedModel
    from ..preset import Preset

#: For the epilog of a command's help.
BASELINES_LISTED = """\
baselines:
  q8_0 q4_0                                llama.cpp's cache types, blocks of 32
  q4_0-hadamard                            the same after a Hadamard rotation
  kivi-4 kivi-2                            keys per channel, values per token, groups of 32
  turboquant-4 turboquant-3 turboquant-2   random rotation and Lloyd-Max, for least squared error
  kvquant-4 kvquant-3 kvquant-2            keys before RoPE and per channel, no outliers (calibrated)
  rank-int8-v rank-int8-kv                 PCA to 3/4 of head_dim, int8 (calibrated)
  hf-fp8                                   transformers' QuantizedCache
  hf-quanto-4 hf-quanto-2                  the same, if optimum-quanto is installed
  hf-hqq-4 hf-hqq-2                        the same, if hqq is installed"""


def add_method_arguments(group: argparse._ArgumentGroup) -> None:
    """``--preset``, ``--bits`` and ``--baselines``."""
    group.add_argument(
        "--preset",
        nargs="+",
        type=Path,
        action="extend",
        default=[],
        metavar="FILE",
        help="calibrated presets (default: the one that comes with kvlathe, where it is of this model)",
    )
    group.add_argument(
        "--bits",
        nargs="+",
        type=positive,
        action="extend",
        default=[],
        help="rates to set the presets to, in bits a value of the coded part, side information included "
        "(default: the rate of each preset)",
    )
    group.add_argument(
        "--baselines", nargs="+", default=[], metavar="NAME", help="'all', or names from the list below"
    )


def add_protocol_arguments(group: argparse._ArgumentGroup, *, calibrated_on: str, sinks: str) -> None:
    """``--calibration-windows``, ``--sinks`` and ``--tail``."""
    group.add_argument(
        "--calibration-windows",
        type=count,
        default=8,
        help=f"for baselines that are calibrated, {calibrated_on} (default %(default)s)",
    )
    group.add_argument("--sinks", type=int, default=4, help=f"first tokens {sinks} (default %(default)s)")
    group.add_argument("--tail", type=int, default=128, help="latest tokens, exact (default %(default)s)")


class Chosen(NamedTuple):
    """What is compared.

    Attributes:
        presets: ours, each with a label that tells it apart; empty where only baselines can be measured.
        baselines: other methods, those that run here.
        skipped: sentences on those that do not.
    """

    presets: list[tuple[str, Preset]]
    baselines: list[Baseline]
    skipped: list[str]


def chosen_methods(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    corpus: Corpus,
    probe: ProbeResult,
    *,
    n_sinks: int,
    window: int,
) -> Chosen:
    """What ``--preset``, ``--bits`` and ``--baselines`` name.

    Args:
        n_sinks: first tokens that baselines keep exact.
        window: tokens of the windows that baselines calibrate on.

    Raises:
        EvaluationError: an unknown name, or neither a preset for this model nor a baseline.
        PresetError: a preset that cannot be read, or is of another model.
    """
    from ..calibration.text.token_windows import windows
    from ..lab.baselines import Subject

    names = _baseline_names(arguments)
    presets = _chosen_presets(arguments, loaded.model.config)
    n_windows, seed = arguments.calibration_windows, arguments.seed
    subject = Subject(
        loaded.model,
        probe,
        n_sinks,
        lambda: windows(loaded.tokenizer, corpus.calibration, window, n_windows, seed),
    )
    return Chosen(presets, *_baselines(names, subject))


def _baseline_names(arguments: argparse.Namespace) -> list[str]:
    """The baselines that were asked for, each once.

    Raises:
        EvaluationError: an unknown name.
    """
    from ..errors import EvaluationError
    from ..lab import baselines

    asked = list(baselines.NAMES) if "all" in arguments.baselines else arguments.baselines
    if unknown := [name for name in asked if name not in baselines.NAMES]:
        raise EvaluationError(
            f"--baselines {' '.join(unknown)}: expected 'all' or names out of {', '.join(baselines.NAMES)}"
        )
    return list(dict.fromkeys(asked))


def _chosen_presets(arguments: argparse.Namespace, config: Any) -> list[tuple[str, Preset]]:
    """Label and preset of everything of ours that is to be measured; empty where only baselines can be.

    Raises:
        EvaluationError: neither a preset for this model nor a baseline.
        PresetError: a preset that cannot be read, or is of another model.
    """
    from ..errors import EvaluationError

    presets = _presets(arguments, config)
    if not presets:
        advice = (
            f"make a preset with: kvlathe tune --model {arguments.model} --output preset.safetensors, "
            "and give it with --preset"
        )
        if not arguments.baselines:
            raise EvaluationError(f"no preset for this model comes with kvlathe; {advice}")
        say(f"note: only baselines are measured, as no preset for this model comes with kvlathe; {advice}")
    return presets


def _presets(arguments: argparse.Namespace, config: Any) -> list[tuple[str, Preset]]:
    from ..errors import PresetError
    from ..preset import Preset
    from ..presets import smollm2

    labelled = arguments.preset
    if not labelled:
        shipped = Preset.load(smollm2())
        try:
            shipped.check_model(config)
        except PresetError:
            return []
        say(f"note: no --preset given; using the one that comes with kvlathe, for {shipped.meta['model']}")
        presets = [("", shipped)]
    else:
        stems = [path.stem for path in labelled]
        unique = len(set(stems)) == len(stems)
        names = stems if unique else [str(path) for path in labelled]
        presets = [
            ("" if len(labelled) == 1 else name, Preset.load(path))
            for name, path in zip(names, labelled, strict=True)
        ]
    for _, preset in presets:
        preset.check_model(config)
    if arguments.bits:
        return [(label, preset.with_bits(bits)) for label, preset in presets for bits in arguments.bits]
    return presets


def _baselines(names: list[str], subject: Subject) -> tuple[list[Baseline], list[str]]:
    """The baselines of those names, and sentences on those that do not run here."""
    from ..errors import EvaluationError
    from ..lab import baselines

    made: list[Baseline] = []
    skipped = []
    for name in names:
        try:
            made.append(baselines.make(name, subject))
        except EvaluationError as error:
            skipped.append(str(error))
            say(f"note: {error}")
    return made, skipped
