#!/usr/bin/env python3
"""A decode step of several architectures over the stock cache's, with whatever transformers is installed.

    python benches/architectures.py
    python benches/architectures.py --models llama olmo3 --tokens 8192
    PYTHONPATH=.venv/compat/python3.11/5.24.0 python benches/architectures.py    # after make test-compat

Models have SmolLM2's shape (30 layers, 9 query heads on 3 KV heads of 64 components) and random weights; caches are
filled with random keys and values and take turns step by step. A figure is the ratio of two medians. Beside it: layers
that our cache expanded in a step, 0 where attention is served from the packed blocks. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from typing import Any

import torch
import transformers
from decode import Contender, shape_of
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvlathe import CompressedDynamicCache, ExpandedWarning, Preset
from kvlathe.presets import smollm2

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 1 << 16,
    "pad_token_id": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llama", "qwen3", "apertus", "arcee", "cwm", "seed_oss", "olmo3", "exaone4", "smollm3"],
    )
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    return parser.parse_args()


def model_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE)
    if getattr(config, "layer_types", None):
        # Every layer with full attention: what is measured is the whole context.
        config.layer_types = ["full_attention"] * len(config.layer_types)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def measure(name: str, preset: Preset, arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Milliseconds of stock and of ours, and layers that ours expanded."""
    model = model_of(name, getattr(torch, arguments.dtype))
    pair = [
        Contender(model, DynamicCache),
        Contender(model, lambda: CompressedDynamicCache.from_preset(preset, uncompressed_tail=128)),
    ]
    caches = [contender.filled(arguments.tokens, shape_of(preset)) for contender in pair]
    times: list[list[float]] = [[], []]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpandedWarning)
        for step in range(arguments.steps + 2):
            for which in (0, 1) if step % 2 else (1, 0):
                ms = pair[which].decode_one(caches[which])
                if step >= 2:
                    times[which].append(ms)
    stock, ours = (statistics.median(series) for series in times)
    return stock, ours, int(caches[1].get_memory_stats()["expanded_layers"])  # type: ignore[attr-defined]


def main() -> int:
    arguments = parse_arguments()
    transformers.logging.set_verbosity_error()  # special tokens beyond the small vocabulary
    preset = Preset.load(smollm2()).with_bits(arguments.bits)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {arguments.dtype}, {arguments.tokens} "
        f"tokens, {arguments.bits:g} bits, {torch.get_num_threads()} threads"
    )
    print(f"{'model':>10} {'stock ms':>9} {'ours ms':>8} {'ratio':>6} {'expanded layers':>16}")
    for name in arguments.models:
        stock, ours, n_expanded = measure(name, preset, arguments)
        print(f"{name:>10} {stock:>9.1f} {ours:>8.1f} {ours / stock:>6.2f} {n_expanded:>16}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
