#!/usr/bin/env python3
"""Milliseconds a decoded token by context length: stock caches, Hugging Face's quantised cache, and ours.

    python benches/decode.py --model smollm2 --contexts 128 2048 8000
    python benches/decode.py --model qwen2.5-coder-0.5b --preset qwen.safetensors --plot decode.png \\
        --contexts 128 2048 8192 16384 32768 --only-ours 131072

Caches are filled with random keys and values (a step's time does not depend on them). Then single tokens are decoded,
in several rounds of a few steps for each cache in turn, and medians are compared: ratios are of one run. Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Cache, DynamicCache, QuantizedCache

from kvlathe import CompressedDynamicCache, Preset, load_model
from kvlathe.presets import smollm2

FILL_TOKENS = 2048
N_ROUNDS = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, default=smollm2())
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 3.25, 4.25])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8000])
    parser.add_argument("--only-ours", type=int, nargs="*", default=[], help="contexts for our cache alone")
    parser.add_argument("--quantized", action="store_true", help="also transformers' QuantizedCache (fp8)")
    parser.add_argument("--steps", type=int, default=5, help="of each of the four rounds")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw them")
    return parser.parse_args()


# Layers, KV heads, head_dim.
Shape = tuple[int, int, int]


def shape_of(preset: Preset) -> Shape:
    """The shape of the caches that a preset is for."""
    return preset.n_layers, preset.meta["kvlathe"]["n_kv_heads"], preset.meta["head_dim"]


def fill(cache: Cache, n_tokens: int, shape: Shape, dtype: torch.dtype) -> Cache:
    """Add random keys and values, in chunks as a prefill would bring them."""
    n_layers, n_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n_tokens, FILL_TOKENS):
        n = min(FILL_TOKENS, n_tokens - start)
        for layer in range(n_layers):
            keys, values = (
                torch.randn((1, n_heads, n, head_dim), generator=generator).to(dtype) for _ in range(2)
            )
            cache.update(keys, values, layer)
    return cache


class Contender:
    """A model in some number format with a way to make caches."""

    def __init__(self, model: Any, make: Callable[[], Cache]) -> None:
        self.model, self.make = model, make

    def filled(self, n_tokens: int, shape: Shape) -> Cache:
        """A cache of its kind with random keys and values."""
        return fill(self.make(), n_tokens, shape, self.model.dtype)

    @torch.no_grad()
    def decode_one(self, cache: Cache) -> float:
        """Milliseconds of one step; the token is removed again where the cache can."""
        start = time.perf_counter()
        self.model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        ms = 1000 * (time.perf_counter() - start)
        if not isinstance(cache, QuantizedCache):
            cache.crop(-1)
        return ms


def contenders(arguments: argparse.Namespace) -> dict[str, Contender]:
    in_float32 = load_model(arguments.model).model
    in_bfloat16 = load_model(arguments.model, dtype=torch.bfloat16).model
    found = {
        "stock float32": Contender(in_float32, DynamicCache),
        "stock bfloat16": Contender(in_bfloat16, DynamicCache),
    }

    def compressed(bits: float) -> Callable[[], Cache]:
        preset = Preset.load(arguments.preset).with_bits(bits)
        return lambda: CompressedDynamicCache.from_preset(preset, uncompressed_tail=128)

    middle = arguments.bits[len(arguments.bits) // 2]
    found[f"ours {middle:g} float32"] = Contender(in_float32, compressed(middle))
    for bits in arguments.bits:
        found[f"ours {bits:g}"] = Contender(in_bfloat16, compressed(bits))
    if arguments.quantized:
        found["HF fp8"] = Contender(
            in_bfloat16, lambda: QuantizedCache(backend="fp8", config=in_bfloat16.config)
        )
    return found


def measure(running: dict[str, Contender], n_tokens: int, shape: Shape, n_steps: int) -> dict[str, float]:
    caches = {name: contender.filled(n_tokens, shape) for name, contender in running.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(N_ROUNDS):
        for name, contender in running.items():
            contender.decode_one(caches[name])  # warms up
            times[name] += [contender.decode_one(caches[name]) for _ in range(n_steps)]
    return {name: statistics.median(series) for name, series in times.items()}


def draw(results: dict[str, dict[int, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    for name, by_context in results.items():
        style = "o-" if name.startswith("ours") else "s--"
        axes.plot(list(by_context), list(by_context.values()), style, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms a decoded token", title=title
    )
    ticks = sorted({n for by_context in results.values() for n in by_context})
    axes.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    times = [ms for by_context in results.values() for ms in by_context.values()]
    round_times = [digit * power for power in (1, 10, 100, 1000) for digit in (1, 2, 3, 5)]
    axes.set_yticks([ms for ms in round_times if 0.9 * min(times) <= ms <= 1.1 * max(times)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    arguments = parse_arguments()
    preset = Preset.load(arguments.preset)
    running = contenders(arguments)
    results: dict[str, dict[int, float]] = {name: {} for name in running}
    print(f"{'tokens':>8} " + " ".join(f"{name:>18}" for name in running))
    for n_tokens in sorted({*arguments.contexts, *arguments.only_ours}):
        chosen = {
            name: contender
            for name, contender in running.items()
            if name.startswith("ours") or n_tokens in arguments.contexts
        }
        medians = measure(chosen, n_tokens, shape_of(preset), arguments.steps)
        cells = [f"{medians[name]:18.1f}" if name in medians else f"{'':>18}" for name in running]
        print(f"{n_tokens:>8} " + " ".join(cells), flush=True)
        for name, ms in medians.items():
            results[name][n_tokens] = ms
    machine = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    print(machine)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "ms_a_token": results}, indent=1))
    if arguments.plot:
        draw(results, f"{preset.meta['model']}, {torch.get_num_threads()} threads", arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
