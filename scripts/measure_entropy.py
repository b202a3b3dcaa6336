#!/usr/bin/env python3
"""How much smaller packed blocks could be at rest: by ideal entropy coding, and by general compressors.

    python scripts/measure_entropy.py --text judge.txt
    python scripts/measure_entropy.py --model ./Qwen2.5-0.5B --preset qwen.safetensors --bits 2.25 3.25 --text judge.txt

A text is read into a cache. Of each field of its blocks (docs/block_format.md) the first half of the text gives the
probabilities, one table for every coefficient of every stream, and the second half is coded by them: as short as an
arithmetic coder could make it, its tables not counted. zlib and LZMA get the blocks as they are.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kvlathe import CompressedDynamicCache, Preset, load_model
from kvlathe.presets import smollm2

Bytes = NDArray[np.uint8]
HEADER_BYTES = 2
_CHUNK = 2048


class Costs:
    """Bits of each field: as stored, and as an ideal coder would store them."""

    def __init__(self) -> None:
        self.stored: dict[str, float] = {}
        self.ideal: dict[str, float] = {}

    def add(self, field: str, symbols: Bytes, bits: int) -> None:
        """One coefficient's codes, or the like; blocks come first."""
        half = len(symbols) // 2
        known, coded = symbols[:half].ravel(), symbols[half:].ravel()
        # Half a count for what was never seen: Krichevsky and Trofimov.
        counts = np.bincount(known, minlength=1 << bits) + 0.5
        nats = -np.log(counts / counts.sum())[coded].sum()
        self.stored[field] = self.stored.get(field, 0.0) + coded.size * bits
        self.ideal[field] = self.ideal.get(field, 0.0) + float(nats / np.log(2))


def codes_of(plane: Bytes, width: int, block_len: int) -> Bytes:
    """Codes [blocks, tokens] of a plane [blocks, bytes]."""
    if width == 3:
        split = block_len // 4
        return codes_of(plane[:, :split], 2, block_len) | (codes_of(plane[:, split:], 1, block_len) << 2)
    n_bytes, token = plane.shape[1], np.arange(block_len)
    shifts = (width * (token // n_bytes)).astype(np.uint8)
    return (plane[:, token % n_bytes] >> shifts) & (2**width - 1)


def count_head(costs: Costs, blocks: Bytes, widths: list[int], block_len: int) -> int:
    """The first head's blocks in [blocks, bytes]; returns their length."""
    at = HEADER_BYTES
    costs.add("sides", blocks[:, at : at + block_len], 8)
    at += block_len
    drift = blocks[:, at : at + (len(widths) + 1) // 2]
    for half in (drift & 15, drift >> 4):
        for coefficient in range(half.shape[1]):
            costs.add("drift", half[:, coefficient], 4)
    at += drift.shape[1]
    for width in filter(None, sorted(widths, reverse=True)):
        n_bytes = width * block_len // 8
        costs.add("codes", codes_of(blocks[:, at : at + n_bytes], width, block_len), width)
        at += n_bytes
    return at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, help="of the model (default: SmolLM2's)")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 3.25, 4.25])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    print(
        f"{'bits a value':>12} {'codes':>8} {'sides':>8} {'drift':>8} {'all':>8} {'zlib':>8} {'LZMA':>8}   saved"
    )
    for bits in arguments.bits:
        preset = Preset.load(arguments.preset or smollm2()).with_bits(bits)
        cache = CompressedDynamicCache.from_preset(preset, model=loaded.model, uncompressed_tail=0)
        with torch.no_grad():
            for chunk in ids.split(_CHUNK, dim=1):
                loaded.model(chunk, past_key_values=cache, logits_to_keep=1)
        costs, raw = Costs(), bytearray()
        for index, layer in enumerate(cache.layers):
            parts = layer.export_parts()
            for side in ("key", "value"):
                blocks = torch.stack([block.data for block in getattr(parts, side).blocks[0]]).numpy()
                raw += blocks.tobytes()
                codec = preset.codec(index, side)
                at = 0
                for head in range(codec.n_heads):
                    at += count_head(
                        costs, blocks[:, at:], list(codec.tables(head)["widths"]), preset.block_len
                    )
                assert at == blocks.shape[1]
        saved = [1 - costs.ideal[field] / costs.stored[field] for field in ("codes", "sides", "drift")]
        saved.append(1 - sum(costs.ideal.values()) / sum(costs.stored.values()))
        saved += [1 - len(packed) / len(raw) for packed in (zlib.compress(raw, 9), lzma.compress(raw))]
        print(f"{preset.bits_per_value:>12.2f} " + " ".join(f"{share:>8.1%}" for share in saved), flush=True)


if __name__ == "__main__":
    main()
