#!/usr/bin/env python3
"""Decode steps, prefill and memory on a GPU: the stock cache and ours, in turns.

The model has the shape of SmolLM2-135M and random weights, which neither time nor memory depends on.
The table in docs/speed.md: ``python benches/gpu_decode.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvlathe import CompressedDynamicCache, Preset, UnverifiedPresetWarning, calibrate
from kvlathe.calibration import CalibrationOptions

VOCAB = 512
PREFILL_CHUNK = 2048


def smollm2_shape() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        rope_theta=1e5,
    )
    return LlamaForCausalLM(config).eval()


def now(device: str) -> float:
    """Seconds, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_of(name: str, model: PreTrainedModel, preset: Preset) -> Cache:
    if name == "stock":
        return DynamicCache()
    return CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=0)


@torch.no_grad()
def measure(
    model: PreTrainedModel, cache: Cache, n_tokens: int, n_steps: int
) -> tuple[int, float, list[float]]:
    """Bytes that the filled cache takes, seconds to fill it, and seconds of each step behind it."""
    device = model.device.type
    ids = torch.randint(0, VOCAB, (1, n_tokens), device=device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    start = now(device)
    for part in ids.split(PREFILL_CHUNK, dim=1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    filled = now(device)
    held_bytes = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    steps = []
    for _ in range(n_steps):
        start_of_step = now(device)
        model(input_ids=ids[:, :1], past_key_values=cache)
        steps.append(now(device) - start_of_step)
    return held_bytes, filled - start, steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (default cuda)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 2048, 8192, 32768], help="tokens")
    parser.add_argument("--bits", type=float, default=3.25, help="bits a value (default 3.25)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each cache gets (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round (default 8)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here: nothing measured (--device cpu tries the script)")
        return

    warnings.simplefilter("ignore", UnverifiedPresetWarning)
    model = smollm2_shape().to(args.device)
    windows = [torch.randint(0, VOCAB, (512,)) for _ in range(6)]
    preset = calibrate(model, windows, options=CalibrationOptions(cost_windows=0)).with_bits(args.bits)
    model = model.to(torch.bfloat16)
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(
        f"{where}, torch {torch.__version__}, {args.bits} bits, bfloat16; medians of {args.rounds} rounds in turns"
    )
    for n_tokens in args.lengths:
        found: dict[str, list[tuple[int, float, list[float]]]] = {"stock": [], "ours": []}
        for _ in range(args.rounds):
            for name, results in found.items():
                results.append(measure(model, cache_of(name, model, preset), n_tokens, args.steps))
        for name, results in found.items():
            held_bytes, fill = (statistics.median(result[i] for result in results) for i in (0, 1))
            steps = sorted(step for _, _, of_round in results for step in of_round)
            print(
                f"{n_tokens:6,} tokens  {name:5}  {held_bytes / 1e6:7.1f} MB held  prefill {fill:6.2f} s  "
                f"step {statistics.median(steps) * 1e3:7.1f} ms ({steps[0] * 1e3:.1f} to {steps[-1] * 1e3:.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
