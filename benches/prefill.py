#!/usr/bin/env python3
"""Seconds and peak memory of reading a long prompt, in one piece and in chunks: the stock cache and ours.

    python benches/prefill.py --model smollm2 --tokens 8000
    python benches/prefill.py --model qwen2.5-coder-0.5b --preset qwen.safetensors --tokens 8192 --dtype bfloat16

Every contender has a process of its own, so that resident memory is its own; the peak is what the process held at most
above what it held with the model loaded and warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache

from kvlathe import CompressedDynamicCache, Preset, load_model
from kvlathe.presets import smollm2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, default=smollm2())
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most megabytes held meanwhile, looked at every few milliseconds."""
    peak, done = [resident_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, float]:
    model = load_model(arguments.model, dtype=getattr(torch, arguments.dtype)).model
    ours = arguments.contender.startswith("ours")
    chunk = arguments.chunk if arguments.contender.endswith("chunked") else arguments.tokens
    cache: DynamicCache = DynamicCache()
    if ours:
        preset = Preset.load(arguments.preset).with_bits(arguments.bits)
        cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=128)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 20000, (1, arguments.tokens), generator=generator)
    model(ids[:, :64], use_cache=False)
    before = resident_mb()
    with peak_memory() as peak:
        start = time.perf_counter()
        for piece in ids.split(chunk, dim=1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": peak[0] - before}


def main() -> int:
    arguments = parse_arguments()
    if arguments.contender:
        print(json.dumps(run(arguments)))
        return 0
    names = {
        "stock": "stock, in one piece",
        "stock-chunked": f"stock, {arguments.chunk} at a time",
        "ours": f"ours {arguments.bits:g}, in one piece",
        "ours-chunked": f"ours {arguments.bits:g}, {arguments.chunk} at a time",
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{arguments.tokens} tokens, {arguments.dtype}, {torch.get_num_threads()} threads")
    print(f"{'':>28} {'seconds':>8} {'of stock':>9} {'peak MB':>8} {'of stock':>9}")
    best = {
        name: {key: min(run[key] for run in runs) for key in ("seconds", "peak_mb")}
        for name, runs in results.items()
    }
    for name, label in names.items():
        seconds, peak = best[name]["seconds"], best[name]["peak_mb"]
        print(
            f"{label:>28} {seconds:>8.1f} {seconds / best['stock']['seconds']:>8.0%} "
            f"{peak:>8.0f} {peak / best['stock']['peak_mb']:>8.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
