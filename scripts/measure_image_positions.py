#!/usr/bin/env python3
"""What M-RoPE costs the keys of an image: their error with positions on three axes, beside that with plain positions.

    python scripts/measure_image_positions.py

Random models of Qwen2.5-VL's kind, with its head_dim, sections and key biases: a preset is calibrated on text, and keys
of a 16 × 16 image are read back from blocks of 64 tokens. The same patches at the plain positions of text are the
yardstick. Without biases keys are about 1.3 large; biases are given for fast pairs and for the slowest eighth of all
pairs, where Qwen2.5 has its largest. Some four minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kvlathe import CalibrationOptions, CompressedDynamicCache, calibrate

_SIDE = 16  # patches of the image, each way
_N_BEFORE, _N_AFTER = 16, 144  # tokens of text around it, so that all of it is coded
_TAIL = 64
_VOCABULARY = 512


def _model(key_biases: tuple[float, float], seed: int) -> PreTrainedModel:
    """With biases of the second standard deviation in the slowest eighth of a head's pairs, of the first elsewhere."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
        for layer in model.model.language_model.layers:
            by_pair = layer.self_attn.k_proj.bias.normal_().view(-1, 64)  # both halves of both heads
            by_pair[:, :56] *= key_biases[0]
            by_pair[:, 56:] *= key_biases[1]
    return model.eval()


def _positions() -> tuple[Tensor, Tensor]:
    """[3, 1, T]: all tokens one after another, and with the image's rows and columns, as Qwen2.5-VL numbers them."""
    n_patches = _SIDE * _SIDE
    plain = torch.arange(_N_BEFORE + n_patches + _N_AFTER).expand(3, 1, -1)
    patch = torch.arange(n_patches)
    image = _N_BEFORE + torch.stack([0 * patch, patch // _SIDE, patch % _SIDE])
    after = _N_BEFORE + _SIDE + torch.arange(_N_AFTER)
    before = torch.arange(_N_BEFORE)
    return plain, torch.cat([before.expand(3, -1), image, after.expand(3, -1)], dim=1)[:, None]


@torch.no_grad()
def _errors(model: PreTrainedModel, bits: list[float], seed: int) -> dict[float, tuple[float, float]]:
    """Relative error of the image's keys, root mean square over layers, by bits a value: plain and image positions."""
    torch.manual_seed(seed)
    windows = [torch.randint(0, _VOCABULARY, (384,)) for _ in range(8)]
    with torch.enable_grad():
        preset = calibrate(
            model,
            windows,
            name="random",
            options=CalibrationOptions(cost_windows=0, tail=_TAIL),
            on_note=lambda _: None,
        )
    n_patches = _SIDE * _SIDE
    text = torch.randn(1, _N_BEFORE + n_patches + _N_AFTER, 256)
    # Patches of an image have much in common.
    text[:, _N_BEFORE : _N_BEFORE + n_patches] = torch.randn(1, 1, 256) + 0.3 * torch.randn(1, n_patches, 256)
    image = slice(_N_BEFORE, _N_BEFORE + n_patches)
    found: dict[float, tuple[float, float]] = {}
    exact: list[DynamicCache] = []
    for positions in _positions():
        exact.append(DynamicCache(config=model.config))
        model(inputs_embeds=text, position_ids=positions, past_key_values=exact[-1])
    for rate in bits:
        pair = []
        for positions, reference in zip(_positions(), exact, strict=True):
            cache = CompressedDynamicCache.from_preset(
                preset.with_bits(rate), model=model, uncompressed_tail=_TAIL
            )
            model(inputs_embeds=text, position_ids=positions, past_key_values=cache)
            squares = [
                (mine.keys - own.keys)[:, :, image].square().mean() / own.keys[:, :, image].square().mean()
                for mine, own in zip(cache.layers, reference.layers, strict=True)
            ]
            pair.append(float(torch.stack(squares).mean().sqrt()))
        found[rate] = (pair[0], pair[1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0, 6.0])
    parser.add_argument(
        "--key-biases",
        nargs="+",
        default=["0:0", "1:100", "2:2", "20:20"],
        help="standard deviations, fast pairs:slow pairs (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print("key biases   bits   error, plain   error, image   ratio")
    for given in arguments.key_biases:
        fast, slow = map(float, given.split(":"))
        runs = [_errors(_model((fast, slow), seed), arguments.bits, seed) for seed in range(arguments.seeds)]
        for rate in arguments.bits:
            plain, image = (
                math.exp(sum(math.log(run[rate][side]) for run in runs) / len(runs)) for side in (0, 1)
            )
            print(f"{given:>10}   {rate:4g}   {plain:12.4f}   {image:12.4f}   {image / plain:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
