"""Which model types of transformers our cache serves from the blocks: tries all of them and writes `docs/models.md`.

python tests/conformance/model_types.py                 # from python/; all, into the page between the two markers
python tests/conformance/model_types.py llama gemma2    # these, printed

Each type is tried in another process, so that one that crashes or hangs costs its own row only.
"""

# As a script it must make the tests' folder importable first.
# ruff: noqa: E402

from __future__ import annotations

import functools
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[2] / "docs" / "models.md"
BEGIN = "<!-- model types: written by tests/conformance/model_types.py -->"
END = "<!-- end of the model types -->"
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
import transformers
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from cache_helpers import hand_made_preset
from kvlathe import (
    CompressedDynamicCache,
    ExpandedWarning,
    IdentityCompressor,
    StreamSetCompressor,
    attach,
)
from kvlathe.attachment import can_attach
from kvlathe.cache.layer import CompressedLayer
from kvlathe.preset import Side
from small_models import Built, NotBuilt, OwnCache, build, model_type_names, quiet, sentence

SECONDS_A_TYPE = 120.0
NEW_TOKENS = 24
TAIL = 8
# Nothing is coded before so many tokens.
NEVER = 10**6
# Of the norm of the logits: float32 in another order, over a dozen steps.
LOGITS_TOLERANCE = 1e-3


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        name: the model type, or the class of a multimodal model.
        model: its class, where it was built.
        same: whether an exact cache gives the tokens of transformers' own.
        outcome: how attention of decoding was served.
    """

    name: str
    model: str
    same: str
    outcome: str


@functools.cache
def compressor(n_heads: int, head_dim: int, side: Side) -> StreamSetCompressor:
    """A codec for so many KV heads, with no calibration behind it: components as they are, in 4 bits each."""
    preset = hand_made_preset([4] * head_dim, n_heads=n_heads, n_sinks=4)
    codec: Any = preset.codec(0, side)
    return StreamSetCompressor(codec, preset.n_sinks)


class Watched(CompressedDynamicCache):
    """Counts layers that handed out their past as ordinary tensors, unasked."""

    n_ordinary = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        ours = isinstance(self.layers[layer_idx], CompressedLayer)
        if ours and type(states[0]) is Tensor and states[0].shape[2] > key_states.shape[2]:
            self.n_ordinary += 1
        return states


def self_attention(cache: Cache) -> Any:
    """The part of a cache that holds what the decoder has read."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def coded_cache(built: Built, stock: Cache, compress_start_len: int) -> Watched:
    """Ours, for keys and values of the shapes that the stock cache of a run shows."""
    # A model may have added layers to its cache, which its config does not tell of.
    layers = self_attention(stock).layers[: len(self_attention(built.stock_cache()).layers)]
    sides = [
        [_compressor_of(getattr(layer, f"{side}s", None), side) for layer in layers]
        for side in ("key", "value")
    ]
    return Watched(*sides, len(layers), compress_start_len, uncompressed_tail=TAIL, config=built.model.config)


def _compressor_of(states: Tensor | None, side: Any) -> Any:
    if states is None or not states.numel():
        return IdentityCompressor()  # the model leaves this layer out, or keeps something else in it
    return compressor(states.shape[1], states.shape[3], side)


def check(name: str) -> Row:
    """Try one type: the stock cache, ours with everything exact, ours coded."""
    with quiet():
        try:
            built = build(name)
        except OwnCache as reason:
            return Row(name, "", "", f"own cache ({reason})")
        except NotBuilt as reason:
            return Row(name, "", "", f"not built ({reason})")
        model = type(built.model).__name__
        try:
            return Row(name, model, *_compare(built))
        except Exception as error:
            return Row(name, model, "no", f"error ({sentence(error)})")


def _compare(built: Built) -> tuple[str, str]:
    """Whether an exact cache gives the same, and how attention was served."""
    stock = built.stock_cache()
    wanted = built.generate(NEW_TOKENS, stock)
    same, outcome = _tried(built, stock, wanted)
    if outcome.startswith("expanded") and can_attach(built.model):
        attach(built.model)
        same, attached = _tried(built, stock, wanted)
        if attached == "from blocks":
            outcome = "from blocks, with attach()"
    return same, outcome


def _tried(built: Built, stock: Cache, wanted: Any) -> tuple[str, str]:
    """With a cache that holds everything exactly, and with one that codes."""
    outcomes = []
    same = ""
    for start in (NEVER, 0):
        cache = coded_cache(built, stock, start)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = built.generate(NEW_TOKENS, built.for_the_model(cache))
        outcomes.append(_outcome(cache, [str(each.message) for each in told if _is_ours(each)]))
        same = same or _sameness(found, wanted)
    return same, max(outcomes, key=lambda outcome: outcome.startswith("expanded"))


def _sameness(found: Any, wanted: Any) -> str:
    if not torch.equal(found.sequences, wanted.sequences):
        return "no"
    logits, exact = torch.stack(found.logits), torch.stack(wanted.logits)
    off = float((logits - exact).norm() / exact.norm())
    return "yes" if off <= LOGITS_TOLERANCE else f"tokens, logits off by {off:.1%}"


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, ExpandedWarning)


def _outcome(cache: Watched, told: Sequence[str]) -> str:
    """How the last decoding step was served: all that is known here of how our cache tells it."""
    if not any(isinstance(layer, CompressedLayer) and layer.get_seq_length() for layer in cache.layers):
        return "exact (transformers' own layers)"
    if cache.n_ordinary:
        return "expanded (by update)"
    if not cache.get_memory_stats()["expanded_layers"]:
        return "from blocks"
    said = told[0] if told else "no warning"
    if by_operation := re.search(r": (\S+) asked for keys or values", said):
        return f"expanded ({by_operation[1]})"
    reason = re.search(r"one call: (.+?)(, which packed tokens do not serve)?\. Results are right", said)
    return f"expanded ({reason[1] if reason else said})"


def rows_of(names: Sequence[str], seconds: float = SECONDS_A_TYPE) -> Iterator[Row]:
    """A row a name, whatever becomes of the process that finds it."""
    worker: _Worker | None = None
    for name in names:
        worker = worker or _Worker()
        row = worker.ask(name, seconds)
        yield row if isinstance(row, Row) else Row(name, "", "", f"error ({row})")
        if not isinstance(row, Row):
            worker.end()
            worker = None
    if worker is not None:
        worker.end()


class _Worker:
    """Another process that tries types."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, name: str, seconds: float) -> Row | str:
        """The row, or what became of the process."""
        self._ours.send(name)
        if not self._ours.poll(seconds):
            return f"no answer within {seconds:.0f} s"
        try:
            row: Row = self._ours.recv()
        except EOFError:
            self._process.join()
            return f"the process ended with status {self._process.exitcode}"
        return row

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        connection.send(check(connection.recv()))


def render(rows: Sequence[Row]) -> str:
    """The table, as Markdown."""
    counts = Counter(row.outcome.partition(" (")[0] for row in rows)
    counted = ", ".join(f"{outcome} {n}" for outcome, n in counts.most_common())
    return "\n".join(
        [
            f"transformers {transformers.__version__}, {len(rows)} types: {counted}.",
            "",
            "| type | class | same tokens | attention of decoding |",
            "|---|---|---|---|",
            *(
                "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) + " |"
                for row in rows
            ),
        ]
    )


def main(names: Sequence[str]) -> int:
    if names:
        print(render(list(rows_of(names))))
        return 0
    rows = []
    everything = [name for kind in model_type_names() for name in kind]
    for row in rows_of(everything):
        rows.append(row)
        print(f"{len(rows)}/{len(everything)} {' | '.join(row)}", flush=True)
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{render(rows)}\n\n{END}{tail}", encoding="utf-8")
    return int(any(row.same not in ("yes", "") or row.outcome.startswith("error") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
