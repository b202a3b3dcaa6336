#!/usr/bin/env python3
"""Long use of one process: operations drawn at random on compressed caches, memory watched, results replayed.

    python scripts/soak.py --minutes 60 --threads 1 --output soak.json
    python scripts/soak.py --model ./Qwen2.5-0.5B --preset qwen.safetensors --minutes 10

A conversation is one cache, used in turn by reading text, greedy decoding, `generate` (also with prompt lookup), crop,
more and other rows of the batch, and deepcopy; half of the conversations read the packed blocks directly,
the others, with eager attention, expand them.
When it ends, some are replayed in a fresh cache, with the same operations: every token and every logit must be the
same, to the bit. The conversation's tokens also go through the exact model, and the KL divergence is noted. Then the
cache is reset and the next conversation begins in it, or in a new one.

Minutes are those of the processor, divided by the threads: on a busy machine it takes longer by the clock. Exit status
1 if a replay differs or memory has grown after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlathe import CompressedDynamicCache, Preset, default_corpus, load_model
from kvlathe.calibration.text.token_windows import windows
from kvlathe.presets import smollm2

# Rows of the batch, at most.
MAX_ROWS = 3
# Tokens that judge a cache at the end of a conversation.
PROBE_TOKENS = 4
WARM_UP = 0.1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="processor time (default %(default)s)")
    parser.add_argument("--conversations", type=int, help="run so many conversations, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", type=Path, default=smollm2())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--context",
        type=int,
        default=500,
        help="tokens after which a conversation ends (default %(default)s)",
    )
    parser.add_argument("--tail", type=int, default=64, help="latest tokens, exact (default %(default)s)")
    parser.add_argument(
        "--replayed",
        type=float,
        default=0.3,
        help="part of the conversations that is replayed (default %(default)s)",
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=16.0,
        help="MB by which memory may have grown after the warm-up (default %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="write what was found as JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class Operation:
    """Something done to a conversation; all chance is in its numbers already."""

    kind: str
    tokens: Tensor | None = None
    number: int = 0
    rows: tuple[int, ...] = ()


@dataclass
class Conversation:
    """A cache, the tokens in it, and how they came there."""

    cache: CompressedDynamicCache
    ids: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))
    logits: Tensor | None = None
    history: list[Operation] = field(default_factory=list)

    @torch.no_grad()
    def read(self, model: Any, tokens: Tensor) -> Tensor:
        """One pass through the model; the logits of all its tokens."""
        logits = model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits
        self.ids, self.logits = torch.cat([self.ids, tokens], dim=1), logits[:, -1]
        return logits

    def apply(self, model: Any, operation: Operation) -> None:
        self.history.append(operation)
        n, tokens = operation.number, operation.tokens
        if operation.kind == "read":
            assert tokens is not None
            self.read(model, tokens.expand(len(self.ids), -1))
        elif operation.kind == "decode":
            for _ in range(n):
                assert self.logits is not None
                self.read(model, self.logits.argmax(-1, keepdim=True))
        elif operation.kind in ("generate", "lookup"):
            assert tokens is not None
            lookup = {"prompt_lookup_num_tokens": 4} if operation.kind == "lookup" else {}
            out = model.generate(
                torch.cat([self.ids, tokens], dim=1),
                past_key_values=self.cache,
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                **lookup,
            )
            # The last token has not been read, candidates that were taken back have gone.
            self.ids, self.logits = out[:, : self.cache.get_seq_length()], None
        elif operation.kind == "crop":
            self.cache.crop(-n)
            self.ids, self.logits = self.ids[:, : self.ids.shape[1] - n], None
        elif operation.kind == "repeat":
            self.cache.batch_repeat_interleave(n)
            self.ids = self.ids.repeat_interleave(n, dim=0)
            self.logits = None if self.logits is None else self.logits.repeat_interleave(n, dim=0)
        elif operation.kind == "reorder":
            rows = torch.tensor(operation.rows)
            self.cache.reorder_cache(rows)
            self.ids = self.ids[rows]
            self.logits = None if self.logits is None else self.logits[rows]
        elif operation.kind == "deepcopy":
            self.cache = copy.deepcopy(self.cache)
        assert self.cache.get_seq_length() == self.ids.shape[1], operation.kind


class Soak:
    """Draws conversations, and keeps account."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.random = random.Random(arguments.seed)
        self.arguments = arguments
        loaded = load_model(arguments.model)
        self.model: Any = loaded.model
        self.preset = Preset.load(arguments.preset)
        text = windows(loaded.tokenizer, default_corpus().held_out, 512, 64, arguments.seed)
        self.text = torch.stack(list(text))
        self.operations: Counter[str] = Counter()
        self.tokens = self.comparisons = self.different_tokens = 0
        self.largest_difference = 0.0
        self.klds: list[float] = []
        # Minutes and MB, with no token in any cache.
        self.resident: list[tuple[float, float]] = []

    def new_cache(self) -> CompressedDynamicCache:
        return CompressedDynamicCache.from_preset(
            self.preset, model=self.model, uncompressed_tail=self.arguments.tail
        )

    def excerpt(self, n_tokens: int) -> Tensor:
        """Text, [1, n_tokens]."""
        window = self.text[self.random.randrange(len(self.text))]
        start = self.random.randrange(len(window) - n_tokens + 1)
        return window[None, start : start + n_tokens]

    def draw(self, conversation: Conversation) -> Operation:
        """What happens next."""
        rows, n_tokens = conversation.ids.shape
        kinds = ["read"]
        if n_tokens:
            kinds += ["read", "crop", "deepcopy"] + (["repeat"] if rows == 1 else ["reorder", "reorder"])
            kinds += ["generate"] * 2 if rows == 1 else []
        elif rows == 1:
            # With tokens in the cache, transformers' assisted decoding reads the whole prompt once more.
            kinds.append("lookup")
        if conversation.logits is not None:
            kinds += ["decode"] * 3
        kind = self.random.choice(kinds)
        if kind == "read":
            return Operation(kind, self.excerpt(self.random.choice([1, 2, 7, 33, 64, 150])))
        if kind in ("generate", "lookup"):
            n_read = self.random.randint(1, 40 if kind == "generate" else 200)
            return Operation(kind, self.excerpt(n_read), self.random.randint(2, 24))
        if kind == "reorder":
            return Operation(
                kind, rows=tuple(self.random.choices(range(rows), k=self.random.randint(1, rows)))
            )
        numbers = {
            "decode": self.random.randint(1, 24),
            "crop": min(n_tokens, self.random.choice([1, 3, 20, 90, 200, n_tokens])),
            "repeat": self.random.randint(2, MAX_ROWS),
            "deepcopy": 0,
        }
        return Operation(kind, number=numbers[kind])

    def converse(self, cache: CompressedDynamicCache) -> CompressedDynamicCache:
        """One conversation in an empty cache, which is returned empty."""
        attention = self.random.choice(["sdpa", "eager"])
        self.model.set_attn_implementation(attention)
        conversation = Conversation(cache)
        processed = 0
        while processed < self.arguments.context:
            operation = self.draw(conversation)
            before = conversation.ids.shape[1]
            conversation.apply(self.model, operation)
            processed += max(0, conversation.ids.shape[1] - before)
            self.operations[operation.kind] += 1
        self.operations[f"conversation with {attention} attention"] += 1
        self.tokens += processed
        if self.random.random() < self.arguments.replayed:
            self.compare(conversation)
        conversation.cache.reset()
        self.operations["reset"] += 1
        return conversation.cache

    def compare(self, lived: Conversation) -> None:
        """Replay a conversation in a fresh cache, and let the exact model read its tokens."""
        again = Conversation(self.new_cache())
        for operation in lived.history:
            again.apply(self.model, operation)
        probe = self.excerpt(PROBE_TOKENS).expand(len(lived.ids), -1)
        self.comparisons += 1
        if not torch.equal(lived.ids, again.ids):
            self.different_tokens += 1
            return
        ids = torch.cat([lived.ids, probe], dim=1)
        ours, replayed = lived.read(self.model, probe), again.read(self.model, probe)
        self.largest_difference = max(self.largest_difference, float((ours - replayed).abs().max()))
        with torch.no_grad():
            exact = self.model(input_ids=ids, use_cache=False).logits[:, -PROBE_TOKENS:]
        p, q = exact.float().log_softmax(-1), ours.float().log_softmax(-1)
        self.klds.append(float((p.exp() * (p - q)).sum(-1).mean()))

    def measure(self, minutes: float) -> None:
        gc.collect()
        if sys.platform.startswith("linux"):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append((round(minutes, 3), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))

    def run(self) -> None:
        wanted, limit, reported = self.arguments.conversations, self.arguments.minutes, -1.0
        minutes, n_conversations = 0.0, 0
        cache = self.new_cache()
        while minutes < limit if wanted is None else n_conversations < wanted:
            if self.random.random() < 0.3:
                cache = self.new_cache()
            cache = self.converse(cache)
            n_conversations += 1
            minutes = time.process_time() / 60 / self.arguments.threads
            self.measure(minutes)
            if minutes - reported >= 1:
                reported = minutes
                memory = f", {self.resident[-1][1]:.0f} MB" if self.resident else ""
                done = (
                    f"{minutes:.0f} of {limit:g} minutes, {max(0.0, limit - minutes):.0f} left"
                    if wanted is None
                    else f"{n_conversations} of {wanted} conversations, {wanted - n_conversations} left"
                )
                print(
                    f"{done}: "
                    f"{sum(self.operations.values())} operations, {self.comparisons} comparisons{memory}",
                    file=sys.stderr,
                    flush=True,
                )
        self.model.set_attn_implementation("sdpa")

    def found(self) -> dict[str, Any]:
        ended = self.resident[-1][0] if self.resident else 0.0
        warm = [(at, mb) for at, mb in self.resident if at >= WARM_UP * ended]
        tenth = max(1, len(warm) // 10)
        sizes = [mb for _, mb in warm]
        growth = 0.0
        if sizes:
            # Medians: single conversations leave more or less behind in the allocator.
            early, late = sorted(sizes[:tenth]), sorted(sizes[-tenth:])
            growth = late[tenth // 2] - early[tenth // 2]
        return {
            "machine": f"torch {torch.__version__}, {platform.machine()}, {self.arguments.threads} threads",
            "arguments": {name: str(value) for name, value in vars(self.arguments).items()},
            "operations": dict(self.operations.most_common()),
            "tokens": self.tokens,
            "comparisons": self.comparisons,
            "replays with other tokens": self.different_tokens,
            "largest difference of logits": self.largest_difference,
            "kld to the exact model": sum(self.klds) / len(self.klds) if self.klds else None,
            "resident_mb": {
                "least": min(sizes, default=None),
                "most": max(sizes, default=None),
                "growth": growth,
                "over_time": self.resident,
            },
        }


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    soak = Soak(arguments)
    soak.run()
    found = soak.found()
    memory = found["resident_mb"]
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))
    n_operations = sum(found["operations"].values())
    print(
        f"{n_operations} operations: " + ", ".join(f"{n} {kind}" for kind, n in found["operations"].items())
    )
    print(f"{found['tokens']} tokens read or generated")
    kld = found["kld to the exact model"]
    print(
        f"{found['comparisons']} replays: {found['replays with other tokens']} with other tokens, logits differ by "
        f"{found['largest difference of logits']:g} at most"
        + ("" if kld is None else f"; KL divergence from the exact model {kld:.5f}")
    )
    if memory["most"] is not None:
        print(
            f"memory after the warm-up: {memory['least']:.0f} to {memory['most']:.0f} MB, grown by "
            f"{memory['growth']:.1f} MB"
        )
    failed = found["replays with other tokens"] or found["largest difference of logits"] > 0
    return int(bool(failed) or memory["growth"] > arguments.growth)


if __name__ == "__main__":
    sys.exit(main())
