"""Which caches a command compares: presets of ours and baselines, by what the user asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import positive, say

if TYPE_CHECKING:
    from ..baselines import Baseline, Subject
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


def baseline_names(arguments: argparse.Namespace) -> list[str]:
    """The baselines that were asked for, each once.

    Raises:
        EvaluationError: an unknown name.
    """
    from .. import baselines
    from ..errors import EvaluationError

    asked = list(baselines.NAMES) if "all" in arguments.baselines else arguments.baselines
    if unknown := [name for name in asked if name not in baselines.NAMES]:
        raise EvaluationError(
            f"--baselines {' '.join(unknown)}: expected 'all' or names out of {', '.join(baselines.NAMES)}"
        )
    return list(dict.fromkeys(asked))


def chosen_presets(arguments: argparse.Namespace, config: Any) -> list[tuple[str, Preset]]:
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


def chosen_baselines(names: list[str], subject: Subject) -> tuple[list[Baseline], list[str]]:
    """The baselines of those names, and sentences on those that do not run here."""
    from .. import baselines
    from ..errors import EvaluationError

    made: list[Baseline] = []
    skipped = []
    for name in names:
        try:
            made.append(baselines.make(name, subject))
        except EvaluationError as error:
            skipped.append(str(error))
            say(f"note: {error}")
    return made, skipped
