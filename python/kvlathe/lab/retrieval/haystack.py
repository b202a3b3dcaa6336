"""The haystack: running text as tokens, that knows where its sentences and lines begin."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

from ...calibration.text.corpus import Document
from ...errors import CorpusError

# After a full stop that a space follows, and after a line break. The space stays with what follows, as most tokenizers
# like it.
_BOUNDARY = re.compile(r"(?<=[.!?])(?=[ \t])|(?<=\n)(?=[^\n])")
# Sentences are given to the tokenizer in batches of so many, so that a long corpus is not read to its end for nothing.
_BATCH = 256


class Haystack:
    """Text of which runs of any length up to ``len`` can be cut.

    Args:
        sentences: token ids of each sentence or line, in order; none empty.

    Raises:
        CorpusError: no text at all.
    """

    def __init__(self, sentences: Sequence[Sequence[int]]) -> None:
        if not sentences:
            raise CorpusError("there is no text to hide needles in")
        self._ids = [token for sentence in sentences for token in sentence]
        self._starts = [0, *accumulate(len(sentence) for sentence in sentences)][:-1]

    @classmethod
    def from_documents(cls, tokenizer: Any, documents: Sequence[Document], n_tokens: int) -> Haystack:
        """A haystack of the first documents, long enough for runs of ``n_tokens`` tokens.

        Twice as much is read where there is as much, so that runs differ.

        Raises:
            CorpusError: the documents have fewer than ``n_tokens`` tokens.
        """
        text = "\n".join(document.text for document in documents)
        pieces = [piece for piece in _BOUNDARY.split(text) if piece]
        sentences: list[list[int]] = []
        total = 0
        for start in range(0, len(pieces), _BATCH):
            found = tokenizer(pieces[start : start + _BATCH], add_special_tokens=False, verbose=False)
            sentences += [list(ids) for ids in found["input_ids"] if len(ids)]
            total = sum(len(ids) for ids in sentences)
            if total >= 2 * n_tokens:
                break
        if total < n_tokens:
            raise CorpusError(
                f"too little text: {len(documents)} documents give {total} tokens, haystacks need {n_tokens}; give "
                f"more text or ask for shorter lengths"
            )
        return cls(sentences)

    def __len__(self) -> int:
        return len(self._ids)

    def run(self, n_tokens: int, random: Random) -> Run:
        """A run of exactly ``n_tokens`` tokens that ends where a sentence ends.

        It begins anywhere, as its length is fixed. The text is a ring: after its last sentence comes its first.

        Raises:
            CorpusError: more tokens than there are.
        """
        if n_tokens > len(self):
            raise CorpusError(f"a run of {n_tokens} tokens of a text that has {len(self)}")
        end = random.choice(self._starts) + len(self)
        first = end - n_tokens
        ring = self._ids + self._ids
        starts = [start + turn for turn in (0, len(self)) for start in self._starts]
        inside = [start - first for start in starts if first < start < end]
        return Run(ring[first:end], [0, *inside, n_tokens])


class Run:
    """A run of text.

    Args:
        ids: its tokens.
        boundaries: rising numbers of tokens after which a sentence ends or the text does, 0 and ``len(ids)`` included.
    """

    def __init__(self, ids: list[int], boundaries: list[int]) -> None:
        self.ids = ids
        self.boundaries = boundaries

    def split(self, depth: float) -> tuple[list[int], list[int]]:
        """What stands before and after the boundary nearest to ``depth``, a share of the run from 0 to 1."""
        wanted = depth * len(self.ids)
        after = bisect_left(self.boundaries, wanted)
        near = self.boundaries[max(0, after - 1) : after + 1]
        at = min(near, key=lambda boundary: abs(boundary - wanted))
        return self.ids[:at], self.ids[at:]
