#!/usr/bin/env python3
"""Is a step ever slower with our cache than with the stock one? Short contexts, where there is little to win.

    python benches/short_contexts.py --model smollm2 --contexts 128 512 2048
    python benches/short_contexts.py --model qwen2.5-coder-0.5b --preset qwen.safetensors --rounds 60

The two caches take turns step by step, first one and then the other ahead, so that both meet the same machine, whose
pace changes from one second to the next by more than what is looked for. A round's figure is the ratio of two medians
of a few steps; printed are the median over rounds and its 95 % interval (bootstrap). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from decode import Contender, Shape, shape_of
from transformers import DynamicCache

from kvlathe import CompressedDynamicCache, Preset, load_model
from kvlathe.presets import smollm2

STEPS_A_ROUND = 5
N_RESAMPLES = 2000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, default=smollm2())
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    return parser.parse_args()


def ratios(stock: Contender, ours: Contender, n_tokens: int, shape: Shape, n_rounds: int) -> list[float]:
    """Our time over stock's, a figure a round."""
    pair = [(stock, stock.filled(n_tokens, shape)), (ours, ours.filled(n_tokens, shape))]
    found = []
    for round_ in range(n_rounds):
        times: dict[int, list[float]] = {0: [], 1: []}
        for step in range(STEPS_A_ROUND + 1):
            for which in (0, 1) if (round_ + step) % 2 else (1, 0):
                contender, cache = pair[which]
                ms = contender.decode_one(cache)
                if step:  # the first warms up
                    times[which].append(ms)
        found.append(statistics.median(times[1]) / statistics.median(times[0]))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the medians of bootstrap samples."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (N_RESAMPLES, len(values)), generator=generator)
    medians = torch.tensor(values)[picks].median(dim=1).values
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def main() -> int:
    arguments = parse_arguments()
    preset = Preset.load(arguments.preset).with_bits(arguments.bits)
    print(f"{'dtype':>10} {'tokens':>7} {'ours / stock':>13} {'95 % interval':>15}")
    for dtype in arguments.dtypes:
        model = load_model(arguments.model, dtype=getattr(torch, dtype)).model
        stock = Contender(model, DynamicCache)
        ours = Contender(model, lambda: CompressedDynamicCache.from_preset(preset, uncompressed_tail=128))
        for n_tokens in arguments.contexts:
            found = ratios(stock, ours, n_tokens, shape_of(preset), arguments.rounds)
            low, high = interval(found)
            print(
                f"{dtype:>10} {n_tokens:>7} {statistics.median(found):>13.3f} {low:>7.3f} to {high:.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
