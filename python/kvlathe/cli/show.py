"""``kvlathe show``: what a preset holds, and what was measured of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..preset import Preset


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe show``."""
    parser.description = "Say what a preset holds and what was measured of it."
    parser.add_argument("preset", type=Path, help="a .json or .safetensors preset")


def run_show(arguments: argparse.Namespace) -> int:
    """``kvlathe show``: works without torch."""
    preset = Preset.load(arguments.preset)
    meta = preset.meta
    print(f"model            {meta['model']}")
    print(
        f"shape            {meta['n_layers']} layers, {meta['n_heads']} query heads, head_dim {meta['head_dim']}"
    )
    print(f"bits a value     {preset.bits_per_value:.3f} (coded part, side information included)")
    if preset.is_seed_style:
        print(f"kind             seed-style: rank {meta['rank']} and int8, values only")
        return 0
    lathe = meta["kvlathe"]
    calibration, measured = lathe["calibration"], lathe["measured"]
    print(
        f"KV heads         {lathe['n_kv_heads']}, blocks of {lathe['block_len']} tokens, {lathe['n_sinks']} sinks"
    )
    print(
        f"calibrated       {lathe['created']} on {calibration.get('n_tokens', '?')} tokens "
        f"of {calibration.get('text', '?')}"
    )
    if not measured:
        print("measured         nothing at this rate: its quality is not verified")
        return 0
    print(f"measured on      {measured['n_positions']} positions of {measured['text']}")
    print(
        f"perplexity       {measured['baseline_perplexity']:.4f} exact, {measured['perplexity']:.4f} compressed"
    )
    print(
        f"KLD              {measured['kld']:.5f} nats, at most {measured['kld_bound']:.5f} "
        f"with {measured['confidence']:.0%}"
    )
    print(f"top-1 agreement  {measured['top1']:.2%}")
    return 0
