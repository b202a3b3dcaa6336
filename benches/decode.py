#!/usr/bin/env python3
"""Milliseconds a decoded token by context length: the stock cache in float32 and bfloat16, and ours from its blocks.

    python benches/decode.py --model smollm2 --contexts 128 2048 4096 8000

Caches are filled with random keys and values (a step's time does not depend on them), then single tokens are decoded,
the caches in turn, and medians are compared. Ratios are of one run; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from kvlathe import CompressedDynamicCache, Preset, attach, detach, load_model
from kvlathe.presets import smollm2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, default=smollm2())
    parser.add_argument("--bits", type=float, help="rate of the preset, by default its own")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 4096, 8000])
    parser.add_argument("--steps", type=int, default=9)
    return parser.parse_args()


def fill(cache: DynamicCache, preset: Preset, n_tokens: int, dtype: torch.dtype) -> None:
    """Random keys and values, in chunks as a prefill would bring them."""
    lathe = preset.meta["kvlathe"]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n_tokens, 2048):
        shape = (1, lathe["n_kv_heads"], min(2048, n_tokens - start), preset.meta["head_dim"])
        for layer in range(preset.n_layers):
            keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            cache.update(keys, values, layer)


@torch.no_grad()
def decode_one(model: Any, cache: DynamicCache) -> float:
    """Seconds of one step; the token is removed again."""
    start = time.perf_counter()
    model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    seconds = time.perf_counter() - start
    cache.crop(-1)
    return seconds


def main() -> int:
    arguments = parse_arguments()
    preset = Preset.load(arguments.preset)
    if arguments.bits:
        preset = preset.with_bits(arguments.bits)
    in_float32 = load_model(arguments.model).model
    in_bfloat16 = load_model(arguments.model, dtype=torch.bfloat16).model
    print(
        f"{'context':>8} {'float32':>9} {'bfloat16':>9} {'ours':>9}   ms a token; float32/ours, bfloat16/ours; our MB"
    )
    for context in arguments.contexts:
        stock32, stock16 = DynamicCache(), DynamicCache()
        ours = CompressedDynamicCache.from_preset(preset, uncompressed_tail=128)
        for cache, dtype in ((stock32, torch.float32), (stock16, torch.bfloat16), (ours, torch.float32)):
            fill(cache, preset, context, dtype)

        def attached() -> float:
            attach(in_float32)
            try:
                return decode_one(in_float32, ours)  # noqa: B023
            finally:
                detach(in_float32)

        runs: list[Callable[[], float]] = [
            lambda cache=stock32: decode_one(in_float32, cache),
            lambda cache=stock16: decode_one(in_bfloat16, cache),
            attached,
        ]
        times: list[list[float]] = [[] for _ in runs]
        for step in range(arguments.steps + 1):
            for run, series in zip(runs, times, strict=True):
                seconds = run()
                if step:  # the first step warms up
                    series.append(1000 * seconds)
        float32, bfloat16, our = (statistics.median(series) for series in times)
        print(
            f"{context:>8} {float32:>9.1f} {bfloat16:>9.1f} {our:>9.1f}   {float32 / our:.2f}x, {bfloat16 / our:.2f}x; "
            f"{ours.get_memory_stats()['total_mb']:.1f}",
            flush=True,
        )
    print(
        f"{preset.bits_per_value:.2f} bits a value; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
