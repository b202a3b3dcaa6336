#!/usr/bin/env python3
"""Quality of compressed caches on a text file, with the seed's configuration in the same run.

    python benches/quality.py --text wikitext2-dev.txt --model smollm2 --output quality.json

The first third of the text calibrates, windows of the rest judge. Streaming protocol: 4 sinks and the last 128
tokens exact. Two calibrations are compared: on the text itself, and on the default corpus (the running Python's
documentation and sources). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kvlathe import (
    CompressedDynamicCache,
    Evaluator,
    IdentityCompressor,
    Preset,
    Quality,
    QuantizedCalibratedCompressor,
    calibrate,
    corpus_from_files,
    default_corpus,
    load_model,
)
from kvlathe.corpus import windows
from kvlathe.evaluation import coders
from kvlathe.fisher import gradient_free_pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        default=[2.0, 3.0, 4.0],
        help="of the coefficients; 16 bits a token and stream come on top",
    )
    parser.add_argument(
        "--seed-ranks", type=int, nargs="*", default=[48, 56], help="ranks of the seed's V-only configuration"
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=40)
    parser.add_argument(
        "--same-preset", type=Path, help="reuse this calibration on the text instead of making one"
    )
    parser.add_argument("--default-preset", type=Path, help="reuse this calibration on the default corpus")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    return parser.parse_args()


Moments = dict[int, list[torch.Tensor]]


def value_moments(model: Any, calibration: Sequence[torch.Tensor]) -> Moments:
    """Count, sum and second moment of each layer's values, heads pooled; computed here with torch alone."""
    moments: Moments = {}

    def on_layer(layer: int, _q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor) -> None:
        x = v.flatten(0, 2).double()
        d = x.shape[1]
        zero = [
            torch.zeros((), dtype=x.dtype),
            torch.zeros(d, dtype=x.dtype),
            torch.zeros(d, d, dtype=x.dtype),
        ]
        total = moments.get(layer, zero)
        moments[layer] = [total[0] + len(x), total[1] + x.sum(0), total[2] + x.T @ x]

    for window in calibration:
        gradient_free_pass(model, window[None], on_layer)
    return moments


def seed_cache(moments: Moments, rank: int) -> CompressedDynamicCache:
    """The seed's configuration: PCA of values, truncated to ``rank``, int8; keys exact."""
    n_layers = len(moments)
    compressors = []
    for layer in range(n_layers):
        count, first, second = moments[layer]
        mean = first / count
        _, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        u = vectors.flip(1)[:, :rank]
        compressors.append(QuantizedCalibratedCompressor(u.float(), mean.float(), bits=8))
    return CompressedDynamicCache([IdentityCompressor()] * n_layers, compressors, n_layers)


def row(name: str, key_bits: float, value_bits: float, quality: Quality) -> dict[str, Any]:
    result = {
        "configuration": name,
        "bits_per_value": (key_bits + value_bits) / 2,
        "kld": quality.kld,
        "kld_p99": quality.kld_p99,
        "ppl": quality.perplexity,
        "ppl_delta": quality.ppl_delta,
        "top1": quality.top1,
    }
    print(
        f"| {name} | {result['bits_per_value']:.2f} | {quality.kld:.5f} | {quality.kld_p99:.4f} | "
        f"{quality.perplexity:.3f} ({100 * quality.ppl_delta:+.2f} %) | {100 * quality.top1:.2f} % |",
        flush=True,
    )
    return result


def main() -> int:
    arguments = parse_arguments()
    loaded = load_model(arguments.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    corpus = corpus_from_files(arguments.text)
    same = windows(tokenizer, corpus.calibration, arguments.window, arguments.calibration_windows, seed=None)
    judged = windows(tokenizer, corpus.held_out, arguments.window, arguments.windows, seed=None)
    presets: dict[str, Preset] = {}
    if arguments.same_preset:
        presets["same text"] = Preset.load(arguments.same_preset)
    else:
        presets["same text"] = calibrate(model, same, name=loaded.name, text_name=corpus.name)
    if arguments.default_preset:
        presets["default corpus"] = Preset.load(arguments.default_preset)
    else:
        other = default_corpus()
        prose = windows(tokenizer, other.calibration, arguments.window, arguments.calibration_windows, seed=0)
        presets["default corpus"] = calibrate(model, prose, name=loaded.name, text_name=other.name)

    start = time.perf_counter()
    evaluator = Evaluator(model, judged)
    rows = []
    print(
        "| cache | bits a value | KLD | KLD, 99th percentile | perplexity | top-1 |\n|---|---|---|---|---|---|"
    )
    for calibrated_on, preset in presets.items():
        side_bits = 16 / preset.meta["head_dim"]
        for bits in arguments.bits:
            candidate = preset.with_bits(bits + side_bits)
            quality = evaluator.run(*coders(CompressedDynamicCache.from_preset(candidate)))
            name = f"kvlathe, {bits:g} bits + {side_bits:g}, {calibrated_on}"
            rows.append(row(name, candidate.bits_per_value, candidate.bits_per_value, quality))
    head_dim = presets["same text"].meta["head_dim"]
    moments = value_moments(model, same) if arguments.seed_ranks else {}
    for rank in arguments.seed_ranks:
        quality = evaluator.run(*coders(seed_cache(moments, rank)))
        rows.append(
            row(f"seed: V only, rank {rank} of {head_dim}, int8", 16.0, (8 * rank + 32) / head_dim, quality)
        )
    print(
        f"\n{loaded.name}, {len(judged)} windows of {arguments.window} tokens of {corpus.name}, "
        f"{time.perf_counter() - start:.0f} s; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
