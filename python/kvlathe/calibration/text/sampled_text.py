"""Text that a model writes itself, to calibrate it on: a model's own words lie nearer to whatever it will be given than
any one corpus does (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ...errors import CorpusError
from ...given_model import evaluation_mode, input_device
from .token_windows import bos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sampling from the whole distribution drifts into noise, from less into repetition.
_TOP_P = 0.95
# Sequences that are written side by side: enough to use the weights well, few enough for the memory.
_BATCH = 16


class _Ticker(BaseStreamer):  # type: ignore[misc, unused-ignore]
    """Moves a bar by the tokens that `generate` has written."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def put(self, value: Tensor) -> None:
        if self.bar is not None:
            self.bar.update(value.numel())

    def end(self) -> None:
        pass


@torch.no_grad()
def sampled_windows(
    model: PreTrainedModel, tokenizer: Any, window: int = 1024, n_windows: int = 16, *, seed: int = 0
) -> list[Tensor]:
    """Windows of text that the model writes itself.

    Each begins with a token drawn from the whole vocabulary (after BOS, if the tokenizer begins a text with it), so
    that all are about something else, and goes on by nucleus sampling at temperature 1. A text that ends is followed
    by another in the same window.

    Args:
        model: a decoder, on any device.
        window: tokens of a window.
        seed: the same seed, model and machine give the same text; other machines round otherwise.

    Returns:
        ``n_windows`` LongTensors [window] on the CPU.

    Raises:
        CorpusError: a window too short for its beginning and one token more.
    """
    bos = bos_ids(tokenizer)
    if window < len(bos) + 2:
        raise CorpusError(
            f"windows of {window} tokens are too short to be written, use {len(bos) + 2} or more"
        )
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=_TOP_P,
        max_length=window,
        # Nothing ends a window, so nothing is padded.
        eos_token_id=None,
        pad_token_id=int(ordinary[0]),
    )
    found: list[Tensor] = []
    device = input_device(model)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _bar(window * n_windows) as bar,
        _no_settings(model),
        evaluation_mode(model),
    ):
        torch.manual_seed(seed)
        while len(found) < n_windows:
            n = min(_BATCH, n_windows - len(found))
            first = ordinary[torch.randint(len(ordinary), (n, 1))]
            start = torch.cat([torch.tensor([bos] * n, dtype=torch.long).reshape(n, -1), first], dim=1)
            generate: Any = model.generate
            written = generate(
                start.to(device),
                attention_mask=torch.ones_like(start).to(device),
                generation_config=config,
                streamer=_Ticker(bar),
            )
            found += list(written.cpu())
    return found


@contextmanager
def _no_settings(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation settings, which fill in what ours leave open: an end of text, penalties."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _bar(n_tokens: int) -> Any:
    if not sys.stderr.isatty():
        return nullcontext()
    from tqdm import tqdm

    return tqdm(desc="writing", unit="token", total=n_tokens, delay=2.0, dynamic_ncols=True, leave=False)
