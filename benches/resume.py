#!/usr/bin/env python3
"""Going on behind a long prompt that was read before: time to the next token and bytes, beside recomputing it.

    python benches/resume.py --text judge.txt
    python benches/resume.py --model ./Qwen2.5-0.5B --preset qwen.safetensors --lengths 8192 32768 --text judge.txt
    python benches/resume.py --text judge.txt --quality     # what it costs that the latest tokens are coded, too

Ways take turns; a figure is a median. "recompute" reads the prompt with the stock cache, as one pass. "torch" saves
that cache with torch.save and loads it again. "file" is cache.save and CompressedDynamicCache.load, "store" a
PrefixStore in a folder; what a store lacks of a prompt, up to a chunk, is computed and counts. Each then runs one
token. Files are in the system's page cache. `--quality`: the divergence of the next tokens' predictions from the exact
cache's, going on in memory with the latest 128 tokens exact, the same with none, and from a stored prefix.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvlathe import CompressedDynamicCache, PrefixStore, Preset, load_model
from kvlathe.presets import smollm2

EXACT_TAIL = 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, help="of the model (default: SmolLM2's)")
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="tokens of the prompt")
    parser.add_argument(
        "--chunk", type=int, default=256, help="tokens of a chunk of the store (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--prompts", type=int, default=12, help="of --quality")
    return parser.parse_args()


def last_logits(model: Any, cache: Any, ids: Tensor, n_last: int = 1) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache, logits_to_keep=n_last).logits
    return logits


def timed(go: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = go()
    return time.perf_counter() - began, done


def speed(model: Any, preset: Preset, ids: Tensor, chunk_len: int, rounds: int) -> None:
    n_tokens = ids.shape[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock = DynamicCache(config=model.config)
        last_logits(model, stock, ids[:, :-1])
        ours = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=0)
        last_logits(model, ours, ids[:, :-1])
        url = (folder / "store").as_uri()
        store = PrefixStore(url, preset, model=model, chunk_len=chunk_len, strict=True)
        n_stored = store.save(ids[:, :-1], ours)
        torch.save(stock, folder / "stock.pt")
        ours.save(folder / "ours.kvl", ids[:, :-1])
        n_bytes = {
            "torch": (folder / "stock.pt").stat().st_size,
            "file": (folder / "ours.kvl").stat().st_size,
            "store": sum(path.stat().st_size for path in (folder / "store").rglob("*.kvl")),
        }
        del stock, ours

        def recompute() -> Tensor:
            return last_logits(model, DynamicCache(config=model.config), ids)

        def by_torch() -> Tensor:
            cache = torch.load(folder / "stock.pt", weights_only=False)
            return last_logits(model, cache, ids[:, -1:])

        def by_file() -> Tensor:
            cache = CompressedDynamicCache.load(folder / "ours.kvl", model=model)
            return last_logits(model, cache, ids[:, -1:])

        def by_store() -> Tensor:
            cache, n_found = store.load(ids)
            assert n_found == n_stored
            return last_logits(model, cache, ids[:, n_found:])

        ways = {"recompute": recompute, "torch": by_torch, "file": by_file, "store": by_store}
        loads: dict[str, Callable[[], Any]] = {
            "torch": lambda: torch.load(folder / "stock.pt", weights_only=False),
            "file": lambda: CompressedDynamicCache.load(folder / "ours.kvl", model=model),
            "store": lambda: store.load(ids),
        }
        first: dict[str, list[float]] = {way: [] for way in ways}
        loading: dict[str, list[float]] = {way: [] for way in ways}
        for at in range(rounds):
            for way, go in ways.items():
                if way == "recompute" and at >= 2:
                    continue
                first[way].append(timed(go)[0])
                if way in loads:
                    loading[way].append(timed(loads[way])[0])
        reference = statistics.median(first["recompute"])
        print(f"\n{n_tokens:,} tokens, {n_stored:,} of them in the store")
        print(f"{'':10} {'load, ms':>10} {'next token, ms':>15} {'sooner':>8} {'MB':>8}")
        for way, seconds in first.items():
            median = statistics.median(seconds)
            load = f"{1e3 * statistics.median(loading[way]):.1f}" if loading[way] else ""
            size = f"{n_bytes[way] / 1e6:.1f}" if way in n_bytes else ""
            print(f"{way:10} {load:>10} {1e3 * median:>15.1f} {reference / median:>7.1f}x {size:>8}")


def divergence(exact: Tensor, given: Tensor) -> Tensor:
    """KL divergence of each position, in nats."""
    p, q = (each[0].double().log_softmax(-1) for each in (exact, given))
    return (p.exp() * (p - q)).sum(-1)


def quality(model: Any, preset: Preset, ids: Tensor, n_prompts: int) -> None:
    n_prefix, n_next = 1024, 256
    n_each = n_prefix + n_next
    folder = tempfile.TemporaryDirectory()
    url = Path(folder.name).as_uri()
    store = PrefixStore(url, preset, model=model, strict=True, uncompressed_tail=0)
    tailed = PrefixStore(url, preset, model=model, strict=True)
    found: dict[str, list[Tensor]] = {}
    for at in range(min(n_prompts, ids.shape[1] // n_each)):
        text = ids[:, at * n_each : (at + 1) * n_each]

        def go_on(cache: Any, text: Tensor = text) -> Tensor:
            steps = [last_logits(model, cache, token) for token in text[:, n_prefix:].split(1, dim=1)]
            return torch.cat(steps, dim=1)

        stock = DynamicCache(config=model.config)
        last_logits(model, stock, text[:, :n_prefix])
        exact = go_on(stock)
        for name, tail in (("in memory, 128 exact", EXACT_TAIL), ("in memory, none exact", 0)):
            cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=tail)
            last_logits(model, cache, text[:, :n_prefix])
            if tail == 0:
                assert store.save(text[:, :n_prefix], cache) == n_prefix
            found.setdefault(name, []).append(divergence(exact, go_on(cache)))
        cache, n_found = store.load(text)
        assert n_found == n_prefix
        found.setdefault("from the store", []).append(divergence(exact, go_on(cache)))
        cache, n_found = tailed.load(text)
        assert n_found == n_prefix
        found.setdefault("from the store, then 128 exact", []).append(divergence(exact, go_on(cache)))
        print(f"\r{at + 1} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    n = len(found["from the store"])
    print(f"KLD in nats, {n} prompts of {n_prefix:,} tokens and the {n_next} after them, one by one")
    print(f"{'':32} {'1 to 16':>10} {'17 to 128':>10} {'129 to 256':>18}")
    for name, each in found.items():
        kld = torch.stack(each)
        late = kld[:, 128:].mean(1)
        spread = late.std() / n**0.5
        print(
            f"{name:32} {kld[:, :16].mean():>10.5f} {kld[:, 16:128].mean():>10.5f} {late.mean():>10.5f} ±{spread:.5f}"
        )


def main() -> None:
    arguments = parse_arguments()
    loaded = load_model(arguments.model, dtype=getattr(torch, arguments.dtype))
    preset = Preset.load(arguments.preset or smollm2()).with_bits(arguments.bits)
    ids = loaded.tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    print(f"{arguments.model} in {arguments.dtype}, {preset.bits_per_value:.3f} bits a value")
    if arguments.quality:
        quality(loaded.model, preset, ids, arguments.prompts)
        return
    for n_tokens in arguments.lengths:
        speed(loaded.model, preset, ids[:, :n_tokens], arguments.chunk, arguments.rounds)


if __name__ == "__main__":
    main()
