"""``kvlathe show``: what a preset holds, and what was measured of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..preset import Preset
from .options import printable

# What a preset says of its measurement is text of whoever wrote it: anything may be missing, or of another type.
_UNKNOWN = "?"
_LONGEST = 200


def _number(values: dict[str, Any], key: str, form: str) -> str:
    value = values.get(key)
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return format(value, form) if known else _UNKNOWN


def _text(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe show``."""
    parser.description = "Say what a preset holds and what was measured of it."
    parser.add_argument("preset", type=Path, help="a .json or .safetensors preset")


def run_show(arguments: argparse.Namespace) -> int:
    """``kvlathe show``: works without torch."""
    preset = Preset.load(arguments.preset)
    meta = preset.meta
    print(f"model            {_text(meta['model'])}")
    print(
        f"shape            {meta['n_layers']} layers, {meta['n_heads']} query heads, head_dim {meta['head_dim']}"
    )
    if len(preset.coded_layers) < preset.n_layers:
        print(
            f"coded layers     {', '.join(map(str, preset.coded_layers))}; the others stay as the model keeps them"
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
        f"calibrated       {_text(lathe['created'])} on {_number(calibration, 'n_tokens', '.0f')} tokens "
        f"of {_text(calibration.get('text', _UNKNOWN))}"
    )
    if not measured:
        print("measured         nothing at this rate: its quality is not verified")
        return 0
    print(
        f"measured on      {_number(measured, 'n_positions', '.0f')} positions of "
        f"{_text(measured.get('text', _UNKNOWN))}"
    )
    print(
        f"perplexity       {_number(measured, 'baseline_perplexity', '.4f')} exact, "
        f"{_number(measured, 'perplexity', '.4f')} compressed"
    )
    print(
        f"KLD              {_number(measured, 'kld', '.5f')} nats, at most {_number(measured, 'kld_bound', '.5f')} "
        f"with {_number(measured, 'confidence', '.0%')}"
    )
    print(f"top-1 agreement  {_number(measured, 'top1', '.2%')}")
    return 0
