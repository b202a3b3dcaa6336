#!/usr/bin/env python3
"""The presets that come with kvlathe: SmolLM2-135M-Instruct at three budgets, from one calibration.

    python scripts/make_shipped_presets.py python/kvlathe/presets

About 15 minutes on two cores. The same seed and Python version give the same presets.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from kvlathe import CalibrationOptions, Preset, TuneOptions, default_corpus, load_model
from kvlathe.calibration.tuning import Tuner, calibrate_on
from kvlathe.presets import BUDGETS, smollm2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the presets")
    parser.add_argument("--calibrated", type=Path, help="take over this preset's calibration")
    parser.add_argument("--calibration-windows", type=int, default=48)
    parser.add_argument("--sampled-windows", type=int, default=0)
    arguments = parser.parse_args()
    loaded = load_model("smollm2")
    corpus = default_corpus()
    options = TuneOptions(
        calibration_windows=arguments.calibration_windows,
        sampled_windows=arguments.sampled_windows,
        calibration=CalibrationOptions(cost_windows=2),
    )
    if arguments.calibrated:
        calibrated = Preset.load(arguments.calibrated)
    else:
        calibrated = calibrate_on(
            loaded.model, loaded.tokenizer, corpus, options, name="SmolLM2-135M-Instruct"
        )
    tuner = Tuner(loaded.model, loaded.tokenizer, corpus, calibrated, options)
    for budget, (target_ppl_delta, target_kld) in BUDGETS.items():
        result = tuner.fit(replace(options, target_ppl_delta=target_ppl_delta, target_kld=target_kld))
        path = arguments.output / smollm2(budget).name
        result.preset.save(path)
        print(
            f"{path}: {result.preset.bits_per_value:.3f} bits a value, KLD {result.verified.quality.kld:.5f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
