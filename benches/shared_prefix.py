#!/usr/bin/env python3
"""Processes that go on from one prefix: memory of all their caches together.

    python benches/shared_prefix.py --text judge.txt

Each process loads the model, then the cache of one prompt, and computes the next token. "torch" is the stock cache by
torch.save and torch.load, "file" one saved cache of ours, "store" a PrefixStore in a folder. A process's memory is its
proportional set size (PSS): what several share counts in parts. The figures are what loading and the token added to the
sum over all processes, while all of them hold their caches. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvlathe import CompressedDynamicCache, PrefixStore, Preset, load_model
from kvlathe.presets import smollm2

WAYS = ("torch", "file", "store")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=8)
    return parser.parse_args()


def pss_bytes() -> int:
    """Memory of this process, what it shares divided among those that share it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell the PSS of a process")


def next_token(model: Any, cache: Any, ids: Tensor) -> int:
    with torch.no_grad():
        return int(model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax())


def use(way: str, folder: Path, ids: Tensor, ready: Barrier, answers: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the preset is of another rate than was verified
    model = load_model("smollm2").model
    preset = Preset.load(folder / "preset.safetensors")
    next_token(model, DynamicCache(config=model.config), ids[:, :300])
    gc.collect()
    # Everybody's weights are there, as pages are shared.
    ready.wait()
    before = pss_bytes()
    ready.wait()
    if way == "torch":
        cache = torch.load(folder / "stock.pt", weights_only=False)
    elif way == "file":
        cache = CompressedDynamicCache.load(folder / "ours.kvl", model=model)
    else:
        store = PrefixStore((folder / "store").as_uri(), preset, model=model, strict=True)
        cache, _ = store.load(ids)
    token = next_token(model, cache, ids[:, cache.get_seq_length() :])
    gc.collect()
    ready.wait()
    after = pss_bytes()
    ready.wait()
    answers.put((after - before, token))


def main() -> None:
    arguments = parse_arguments()
    loaded = load_model("smollm2")
    text = arguments.text.read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    preset = Preset.load(smollm2("tight")).with_bits(arguments.bits)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preset.save(folder / "preset.safetensors")
        print(f"reading {ids.shape[1]} tokens, twice", flush=True)
        stock = DynamicCache(config=loaded.model.config)
        next_token(loaded.model, stock, ids[:, :-1])
        torch.save(stock, folder / "stock.pt")
        ours = CompressedDynamicCache.from_preset(preset, model=loaded.model)
        next_token(loaded.model, ours, ids[:, :-1])
        ours.save(folder / "ours.kvl")
        PrefixStore((folder / "store").as_uri(), preset, model=loaded.model, strict=True).save(
            ids[:, :-1], ours
        )
        del stock, ours
        print(f"{arguments.processes} processes, MB of all caches together")
        for way in WAYS:
            ready, answers = context.Barrier(arguments.processes), context.Queue()
            processes = [
                context.Process(target=use, args=(way, folder, ids, ready, answers))
                for _ in range(arguments.processes)
            ]
            for process in processes:
                process.start()
            given = [answers.get(timeout=600) for _ in processes]
            for process in processes:
                process.join()
            tokens = {token for _, token in given}
            print(f"{way:6} {sum(n for n, _ in given) / 1e6:8.1f}  next token {tokens}", flush=True)


if __name__ == "__main__":
    main()
