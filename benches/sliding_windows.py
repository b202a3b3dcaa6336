#!/usr/bin/env python3
"""A decode step of models with sliding windows: stock cache and ours in turns, the cache's bytes beside it.

    python benches/sliding_windows.py
    python benches/sliding_windows.py --dtypes float32 --contexts 8192

Layers have the shapes of Mistral 7B v0.1 (a window of 4,096 tokens in every layer) and of Gemma 3 1B (512 in five
layers of six), random weights, and are fewer than the real models' ones: what a step costs does not depend on the
weights. A round's figure is the median of a few steps of each cache; printed are medians over rounds. Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from decode import fill
from transformers import (
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from kvlathe import CalibrationOptions, CompressedDynamicCache, Preset, calibrate
from kvlathe.cache.layer_kinds import tensor_bytes

VOCABULARY = 4096
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Mistral 7B": (
        MistralForCausalLM,
        MistralConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=2,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            sliding_window=4096,
            max_position_embeddings=32768,
        ),
    ),
    "Gemma 3 1B": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=6,
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
            query_pre_attn_scalar=256,
            max_position_embeddings=32768,
        ),
    ),
}
STEPS_A_ROUND = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    return parser.parse_args()


def preset_for(model: PreTrainedModel, bits: float) -> Preset:
    """Any preset does: time depends on its rate alone."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(VOCABULARY, (256,), generator=generator) for _ in range(3)]
    options = CalibrationOptions(gradients=False, cost_windows=0)
    return calibrate(model, windows, options=options).with_bits(bits)


@torch.no_grad()
def decode_one(model: PreTrainedModel, cache: Cache) -> float:
    """Milliseconds of one step; the token stays."""
    start = time.perf_counter()
    model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    return 1000 * (time.perf_counter() - start)


def held_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors, or packed blocks."""
    if isinstance(cache, CompressedDynamicCache):
        return int(cache.get_memory_stats()["total_bytes"])
    return sum(tensor_bytes(layer) for layer in cache.layers)


def measure(model: PreTrainedModel, caches: dict[str, Cache], n_rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(n_rounds):
        for name, cache in caches.items():
            decode_one(model, cache)  # warms up
            times[name].append(statistics.median(decode_one(model, cache) for _ in range(STEPS_A_ROUND)))
    return {name: statistics.median(series) for name, series in times.items()}


def main() -> int:
    arguments = parse_arguments()
    print(
        f"{'model':>12} {'dtype':>9} {'tokens':>7} {'stock ms':>9} {'ours':>7} {'ratio':>6} {'stock MB':>9} {'ours':>7}"
    )
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config).eval()
        preset = preset_for(model, arguments.bits)
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        for dtype in arguments.dtypes:
            model = model.to(getattr(torch, dtype))
            for n_tokens in arguments.contexts:
                ours = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=128)
                caches = {
                    "stock": fill(DynamicCache(config=config), n_tokens, shape, model.dtype),
                    "ours": fill(ours, n_tokens, shape, model.dtype),
                }
                ms = measure(model, caches, arguments.rounds)
                mb = {which: held_bytes(cache) / 1e6 for which, cache in caches.items()}
                print(
                    f"{name:>12} {dtype:>9} {n_tokens:>7} {ms['stock']:>9.1f} {ms['ours']:>7.1f} "
                    f"{ms['ours'] / ms['stock']:>6.2f} {mb['stock']:>9.2f} {mb['ours']:>7.2f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
