#!/usr/bin/env python3
"""Many processes that save and load prefixes of a mix of documents for minutes: throughput, hits, errors, memory.

    make test-services ARGS="--collect-only"       # sets up Redis and an S3 server
    python benches/store_load.py --services .venv/services --minutes 10

Each process takes documents by chance, some often and most seldom, looks for the longest stored prefix, compares every
block with what the document's cache holds, and saves what is missing. Caches hold numbers made from the document's
number, of SmolLM2's sizes. One half of the time goes to Redis, one to the S3 server (moto, one Python process: a server
for tests).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from kvlathe import CompressedDynamicCache, PrefixStore, PrefixStoreError, Preset, load_model
from kvlathe.presets import smollm2

sys.path.insert(0, str(Path(__file__).parents[1] / "python" / "tests"))
from services.servers import put, redis_server, s3_environment, s3_server

N_DOCUMENTS, LONGEST = 60, 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--processes", type=int, default=8)
    return parser.parse_args()


def document(number: int, preset: Preset, model: Any) -> tuple[list[int], CompressedDynamicCache]:
    """Token ids, and a cache of them."""
    made = torch.Generator().manual_seed(number)
    n_tokens = 256 * (1 + number % (LONGEST // 256))
    ids = torch.randint(0, 40_000, (n_tokens,), generator=made).tolist()
    cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=0)
    for layer, (n_heads, dim, _) in enumerate(filter(None, preset.layer_shapes)):
        keys, values = torch.randn(2, 1, n_heads, n_tokens, dim, generator=made)
        cache.update(keys, values, layer)
    return ids, cache


def blocks_of(cache: CompressedDynamicCache, n_tokens: int, block_len: int) -> list[bytes]:
    parts = [layer.export_parts() for layer in cache.layers]
    n_blocks = n_tokens // block_len
    return [
        bytes(block)
        for part in parts
        for side in (part.key, part.value)
        for block in side.blocks[0][:n_blocks]
    ]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(url: str, seed: int, until: float, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, preset = load_model("smollm2").model, Preset.load(smollm2("tight"))
    store = PrefixStore(url, preset, model=model, uncompressed_tail=0, strict=True, timeout_s=30)
    chance = random.Random(seed)
    known: dict[int, tuple[list[int], CompressedDynamicCache]] = {}
    count = {"loads": 0, "hits": 0, "tokens found": 0, "wrong": 0, "saves": 0, "errors": 0}
    resident = []
    while time.time() < until:
        number = min(int(chance.paretovariate(0.6)) - 1, N_DOCUMENTS - 1)
        if number not in known:
            known[number] = document(number, preset, model)
        ids, cache = known[number]
        try:
            found, n_tokens = store.load([*ids, 1])
            count["loads"] += 1
            count["hits"] += n_tokens > 0
            count["tokens found"] += n_tokens
            expected = blocks_of(cache, n_tokens, preset.block_len)
            count["wrong"] += n_tokens > 0 and blocks_of(found, n_tokens, preset.block_len) != expected
            if n_tokens < len(ids):
                store.save(ids, cache)
                count["saves"] += 1
        except PrefixStoreError as error:
            count["errors"] += 1
            print(error, flush=True)
        if len(known) == N_DOCUMENTS or count["loads"] % 50 == 49:
            resident.append(resident_bytes())
    # Growth of the later half: by then most documents are known.
    half = resident[len(resident) // 2 :] or [0]
    answers.put({**count, "MB at half": half[0] // 2**20, "MB at the end": half[-1] // 2**20})


def main() -> None:
    arguments = parse_arguments()
    services = arguments.services.resolve()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        redis, s3 = redis_server(services, Path(folder)), s3_server(services)
        os.environ.update(s3_environment(s3))
        try:
            redis.start()
            s3.start()
            put(s3, "/caches")
            for url in (f"redis://127.0.0.1:{redis.port}/0", "s3://caches/of/models"):
                answers = context.Queue()
                until = time.time() + arguments.minutes * 30
                processes = [
                    context.Process(target=work, args=(url, seed, until, answers))
                    for seed in range(arguments.processes)
                ]
                for process in processes:
                    process.start()
                given = [answers.get(timeout=arguments.minutes * 30 + 300) for _ in processes]
                for process in processes:
                    process.join()
                total = {name: sum(of[name] for of in given) for name in given[0]}
                seconds = arguments.minutes * 30
                print(url.split(":")[0], total, flush=True)
                print(
                    f"  {total['loads'] / seconds:.1f} loads/s, {total['tokens found'] / seconds:,.0f} tokens/s, "
                    f"hit rate {total['hits'] / max(1, total['loads']):.1%}",
                    flush=True,
                )
        finally:
            redis.stop()
            s3.stop()


if __name__ == "__main__":
    main()
