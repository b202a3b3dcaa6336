#!/usr/bin/env python3
"""What a longer context adds to a decode step: llama.cpp's caches (flash attention; f16, q8_0, q4_0) and ours.

    uv pip install llama-cpp-python          # built from its source package for this machine; takes some minutes
    python benches/vs_llama_cpp.py --model qwen2.5-coder-0.5b --gguf qwen.gguf --preset qwen.safetensors

Both run the same model, with the same number of threads, one after the other in one run. Their weights are stored
differently, so whole steps do not compare; the part that depends on the context does: milliseconds of a step behind N
tokens minus those of a step behind 128. llama.cpp's cache is filled by reading 2048 tokens, saving the sequence's
state and loading it back N/2048 times over, because reading 32768 tokens takes many minutes on two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SEED_TOKENS = 2048
CACHE_TYPES = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder, GGUF file or hub name for transformers")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--preset", type=Path, help="a preset for the model")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 3.25, 4.25])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192, 16384, 32768])
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--side", choices=["llama", "ours"], help=argparse.SUPPRESS)
    return parser.parse_args()


def median_ms(step: Callable[[], None], n: int) -> float:
    """Median of n timed calls, after two that warm up."""
    times = []
    for _ in range(n + 2):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def repeated_state(state: bytes, n_tokens: int) -> bytes:
    """A sequence's state with its cells repeated up to ``n_tokens``, at rising positions.

    The layout (llama.cpp, `llama_kv_cache::state_write`): a magic number and a flag (newer versions); number of
    streams; for each the number of cells; for each cell its position, number of sequences and their ids; then a
    flag for transposed values, the number of layers, and for keys and for values by layer: type, bytes of a row,
    rows.
    """
    view = memoryview(state)
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, view, at)
        at += struct.calcsize("<" + form)
        return value

    known = struct.pack("<II", 1, SEED_TOKENS)
    at = max(0, state.find(known, 0, 16))
    prefix = state[:at]
    n_streams, n_cells = take("I"), take("I")
    cell_bytes = None
    for size in (8, 12):
        # Where the second cell begins, with position 1.
        if struct.unpack_from("<i", view, at + size)[0] == 1:
            cell_bytes = size
            break
    if (n_streams, n_cells) != (1, SEED_TOKENS) or cell_bytes is None:
        raise SystemExit(
            "this llama.cpp lays its state out differently; 0.3.36 of llama-cpp-python is known to work"
        )
    rest_of_cell = bytes(view[at + 4 : at + cell_bytes])
    at += n_cells * cell_bytes
    out = [prefix, struct.pack("<II", 1, n_tokens)]
    out += [struct.pack("<i", position) + rest_of_cell for position in range(n_tokens)]
    transposed, n_layers = take("I"), take("I")
    if transposed:
        raise SystemExit("values are stored transposed: flash attention is off")
    out.append(struct.pack("<II", transposed, n_layers))
    for _ in range(2 * n_layers):
        kind, row_bytes = take("i"), take("Q")
        rows = bytes(view[at : at + n_cells * row_bytes])
        at += n_cells * row_bytes
        repeats = -(-n_tokens // n_cells)
        out.append(struct.pack("<iQ", kind, row_bytes) + (rows * repeats)[: n_tokens * row_bytes])
    return b"".join(out)


def run_llama(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    import llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    model = llama.llama_model_load_from_file(str(arguments.gguf).encode(), llama.llama_model_default_params())
    results: dict[str, dict[int, float]] = {}
    for name, kind in CACHE_TYPES.items():
        params = llama.llama_context_default_params()
        params.n_ctx = max(arguments.contexts) + SEED_TOKENS
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = arguments.threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = getattr(llama, kind)
        context = llama.llama_init_from_model(model, params)
        memory = llama.llama_get_memory(context)
        tokens = [(7919 * i) % 20000 + 100 for i in range(SEED_TOKENS)]
        for start in range(0, SEED_TOKENS, 512):
            chunk = (ctypes.c_int32 * 512)(*tokens[start : start + 512])
            if llama.llama_decode(context, llama.llama_batch_get_one(chunk, 512)):
                raise SystemExit("llama_decode failed")
        size = llama.llama_state_seq_get_size(context, 0)
        buffer = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(context, buffer, size, 0)
        seed = bytes(buffer)
        results[name] = {}
        for n_tokens in arguments.contexts:
            llama.llama_memory_clear(memory, True)
            state = repeated_state(seed, n_tokens)
            loaded = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            if llama.llama_state_seq_set_data(context, loaded, len(state), 0) != len(state):
                raise SystemExit("llama.cpp refused the state")

            def step(n_tokens: int = n_tokens) -> None:
                token = (ctypes.c_int32 * 1)(1000)
                if llama.llama_decode(context, llama.llama_batch_get_one(token, 1)):  # noqa: B023
                    raise SystemExit("llama_decode failed")
                llama.llama_synchronize(context)  # noqa: B023
                llama.llama_memory_seq_rm(memory, 0, n_tokens, -1)  # noqa: B023

            results[name][n_tokens] = median_ms(step, arguments.steps)
            print(f"  llama.cpp {name:>5} {n_tokens:>6}: {results[name][n_tokens]:8.1f} ms", file=sys.stderr)
        llama.llama_free(context)
    return results


def run_ours(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    import torch
    from decode import fill, shape_of

    from kvlathe import CompressedDynamicCache, Preset, load_model

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, dtype=torch.bfloat16).model
    results: dict[str, dict[int, float]] = {}
    for bits in arguments.bits:
        preset = Preset.load(arguments.preset).with_bits(bits)
        name = f"ours {bits:g}"
        caches = {
            n: fill(
                CompressedDynamicCache.from_preset(preset, uncompressed_tail=128),
                n,
                shape_of(preset),
                torch.bfloat16,
            )
            for n in arguments.contexts
        }

        def step(n_tokens: int) -> None:
            with torch.no_grad():
                model(input_ids=torch.tensor([[1000]]), past_key_values=caches[n_tokens])  # noqa: B023
            caches[n_tokens].crop(-1)  # noqa: B023

        # Whole steps are long beside what is looked for: contexts take turns, and differences are paired.
        rounds = [{n: median_ms(partial(step, n), 1) for n in caches} for _ in range(arguments.steps)]
        base = statistics.median(times[arguments.contexts[0]] for times in rounds)
        results[name] = {
            n: base + statistics.median(times[n] - times[arguments.contexts[0]] for times in rounds)
            for n in caches
        }
        for n_tokens, ms in results[name].items():
            print(f"  {name:>15} {n_tokens:>6}: {ms:8.1f} ms", file=sys.stderr)
    return results


def main() -> int:
    arguments = parse_arguments()
    if arguments.side:
        run = run_llama if arguments.side == "llama" else run_ours
        print(json.dumps(run(arguments)))
        return 0
    if not (arguments.model and arguments.gguf and arguments.preset):
        print("skipped: needs --model, --gguf and --preset (see --help)")
        return 0
    results: dict[str, dict[str, float]] = {}
    for side in ("llama", "ours"):
        # Each in a process of its own: their OpenMP threads would spin beside one another.
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results |= json.loads(done.stdout.splitlines()[-1])
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))
    contexts = [str(n) for n in arguments.contexts]
    base = contexts[0]
    print("| cache | " + " | ".join(f"+{int(n):,}" for n in contexts[1:]) + f" | whole step at {base} |")
    print("|---|" + "---|" * len(contexts))
    for name, by_context in results.items():
        parts = [f"{by_context[n] - by_context[base]:.1f}" for n in contexts[1:]]
        print(f"| {name} | " + " | ".join(parts) + f" | {by_context[base]:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
