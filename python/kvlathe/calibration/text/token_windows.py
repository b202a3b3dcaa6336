"""Windows of tokens, cut from documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...errors import CorpusError
from .corpus import Document, rank


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without special tokens of the tokenizer's own."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def bos_ids(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer itself begins a text with it, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if bos is not None and first == [bos] else []


def _pieces(
    tokenizer: Any, documents: Sequence[Document], body: int, seed: int | None
) -> Iterator[tuple[list[int], bool]]:
    """Token runs in packing order, and whether each ends with a line break of its own.

    Without a seed whole documents as given; with one, in rounds, the next ``body`` tokens of every document.
    """
    if seed is None:
        for document in documents:
            yield token_ids(tokenizer, document.text), document.text.endswith("\n")
        return
    ordered = sorted(documents, key=lambda document: rank(document.name, seed))
    tokens: dict[str, list[int]] = {}
    start, pending = 0, ordered
    while pending:
        for document in pending:
            if document.name not in tokens:  # late, because the first round often suffices
                tokens[document.name] = token_ids(tokenizer, document.text)
            ids = tokens[document.name]
            if start < len(ids):
                yield ids[start : start + body], start + body >= len(ids) and document.text.endswith("\n\n")
        start += body
        pending = [document for document in pending if start < len(tokens[document.name])]


def windows(
    tokenizer: Any,
    documents: Sequence[Document],
    window: int = 1024,
    n_windows: int = 16,
    seed: int | None = 0,
) -> list[torch.Tensor]:
    """Full windows of tokens for the model.

    With a seed, documents come in an order that depends on it, each gives at most one window of its own per
    round, so that one long document does not fill the sample, and the rests of documents are packed together,
    a blank line between two. Without (None), all documents are packed one after another in the given order,
    as running text. Windows begin with BOS if the tokenizer begins a text with it; no BOS stands inside a
    window.

    Returns:
        ``n_windows`` LongTensors [window] on the CPU.

    Raises:
        CorpusError: too little text; the message says how much there is and how much is needed.
    """
    if window < 2 or n_windows < 1:
        raise CorpusError(f"window must be at least 2 and n_windows at least 1, got {window} and {n_windows}")
    bos = bos_ids(tokenizer)
    body = window - len(bos)
    blank = token_ids(tokenizer, "\n\n")
    found: list[list[int]] = []
    rest: list[int] = []
    n_tokens = 0
    for piece, text_ends in _pieces(tokenizer, documents, body, seed):
        n_tokens += len(piece)
        if seed is not None and len(piece) == body:
            found.append(piece)
        else:
            rest += piece
            full = len(rest) // body
            found += [rest[i * body : (i + 1) * body] for i in range(full)]
            rest = rest[full * body :]
            if rest and not text_ends:
                rest += blank
        if len(found) >= n_windows:
            return [torch.tensor(bos + ids, dtype=torch.long) for ids in found[:n_windows]]
    raise CorpusError(
        f"too little text: {len(documents)} documents give {n_tokens} tokens, that is {len(found)} full "
        f"windows of {window}; {n_windows} windows need {n_windows * window} tokens"
    )
