#!/usr/bin/env python3
"""vLLM with a tier behind its cache, in a new process: time to the first token and bytes, beside its own `fs` tier and
beside recomputing the prompt; and what coded prefixes change of the next tokens.

    python benches/vllm.py --vllm ~/.cache/kvlathe/vllm --text judge.txt        # make test-services sets vLLM up

One process reads the prompts and ends; another one, told to forget what vLLM itself holds before each prompt, answers
them again, `--rounds` times; a figure is a median. Runs on a CPU, as vLLM's build for CPUs does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvlathe import Preset, load_model
from kvlathe.presets import smollm2

# As vLLM moves them together, one of its blocks on a CPU.
CHUNK_TOKENS = 128

PACKAGE = Path(__file__).parents[1] / "python"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment that has it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[2048, 4096, 8000],
        help="tokens of a prompt",
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 3.25], help="of our presets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12, help="whose next tokens are compared")
    return parser.parse_args()


def ask(arguments: argparse.Namespace, **told: Any) -> dict[str, Any]:
    """What a vLLM process says."""
    done = subprocess.run(
        [
            arguments.vllm / "bin" / "python",
            PACKAGE / "tests" / "services" / "vllm_process.py",
        ],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        input=json.dumps({"warm_up": True, **told}),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("answers ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    answers: dict[str, Any] = json.loads(lines[-1].removeprefix("answers "))
    return answers


def kld(exact: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Mean divergence of the next tokens' distributions, in nats."""
    of_each = []
    for one, other in zip(exact, others, strict=True):
        p, q = one["first_logprobs"], other["first_logprobs"]
        of_each.append(sum(math.exp(log_p) * (log_p - q[token]) for token, log_p in p.items()))
    return statistics.mean(of_each)


def main() -> None:
    arguments = parse_arguments()
    loaded = load_model("smollm2")
    ids = loaded.tokenizer(arguments.text.read_text(encoding="utf-8")).input_ids
    lengths = [n for n in arguments.lengths if n <= len(ids)]
    prompts = [ids[:length] for length in lengths]
    judged = [ids[: 2048 + 37 * at] for at in range(arguments.prompts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        loaded.model.to(torch.bfloat16).save_pretrained(model)
        loaded.tokenizer.save_pretrained(model)
        ways: dict[str, dict[str, Any] | None] = {"recomputed": None}
        folders = {"fs": folder / "fs"}
        ways["fs"] = {"type": "fs", "root_dir": str(folders["fs"])}
        for bits in arguments.bits:
            preset = folder / f"{bits}.safetensors"
            Preset.load(smollm2("tight")).with_bits(bits).save(preset)
            way = f"kvlathe {bits} bits"
            folders[way] = folder / str(bits)
            ways[way] = {
                "type": "CompressedTier",
                "module_path": "kvlathe.plugins.vllm",
                "url": folders[way].as_uri(),
                "preset": str(preset),
            }
        exact: list[dict[str, Any]] = []
        print(f"{'':18}" + "".join(f"{n:>9} tok" for n in lengths) + f"{'KLD':>10}{'MB a 1,000 tok':>16}")
        for way, tier in ways.items():
            told = {"model": str(model), "tier": tier}
            if tier is not None:
                folders[way].mkdir()
                ask(arguments, prompts=[*prompts, judged[-1]], **told)
            timed = ask(
                arguments,
                prompts=prompts * arguments.rounds,
                forget=True,
                max_tokens=2,
                **told,
            )
            ms = [
                statistics.median(answer["first_token_s"] for answer in timed["answers"][at :: len(prompts)])
                * 1e3
                for at in range(len(prompts))
            ]
            said = ask(
                arguments,
                prompts=judged,
                forget=True,
                max_tokens=1,
                n_logprobs=-1,
                **told,
            )["answers"]
            exact = exact or said
            row = f"{way:18}" + "".join(f"{one:>10.0f} ms" for one in ms) + f"{kld(exact, said):>10.5f}"
            if tier is not None:
                sizes = [
                    path.stat().st_size for path in folders[way].rglob("*") if path.suffix in (".bin", ".kvl")
                ]
                row += f"{sum(sizes) / (CHUNK_TOKENS * len(sizes)) / 1e3:>16.2f}"
            print(row, flush=True)
            if tier is not None:
                cached = [answer["n_cached"] for answer in timed["answers"][: len(prompts)]]
                print(
                    f"{'':18}loaded tokens: {cached}; chunks hit: {hits(timed['counters'])}",
                    flush=True,
                )


def hits(counters: dict[str, float]) -> int:
    return int(sum(n for name, n in counters.items() if "chunk_hits1:" in name))


if __name__ == "__main__":
    main()
