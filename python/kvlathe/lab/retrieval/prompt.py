"""Prompts: a needle in a haystack, the question last, in the tokenizer's chat template where it has one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from ...calibration.text.token_windows import bos_ids, token_ids
from ...errors import EvaluationError
from .haystack import Haystack
from .needle import Needle, NeedleKind

_TASK = "Read the text. A question about it follows.\n\n"
# Where the text will stand in what the chat template makes; no template changes a word in the middle of a message.
_MARK = "kvlathe-haystack"


@dataclass(frozen=True)
class Prompt:
    """Tokens of one trial.

    Attributes:
        kind, number: the needle's kind, and which of its cell it is, from 0 on.
        length: tokens of all three parts below together.
        depth: where the needle was wanted, a share of the haystack from 0 to 1.
        needle_at: tokens before it in the prompt.
        text: ids of the opening of the chat and the haystack with the needle.
        question: ids of the question, the chat's turn and the opening of the reply.
        answer: ids that are scored.
        answer_text: the same for people.
    """

    kind: str
    number: int
    length: int
    depth: float
    needle_at: int
    text: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    answer_text: str

    @property
    def digest(self) -> str:
        """Digest of all tokens."""
        digest = hashlib.sha256()
        for part in (self.text, self.question, self.answer):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(torch.tensor(part, dtype=torch.int64).numpy().tobytes())
        return digest.hexdigest()[:16]


def _around(tokenizer: Any, needle: Needle) -> tuple[str, str, bool]:
    """What stands before and after the haystack, and whether the first part brings its own BOS."""
    after = f"\n\n{needle.question}"
    if not getattr(tokenizer, "chat_template", None):
        # A base model continues text: the question in words would only be in the way.
        return "", f"\n\n{needle.opening}", False
    message = {"role": "user", "content": f"{_TASK}{_MARK}{after}"}
    rendered = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    before, *rest = rendered.split(_MARK)
    if len(rest) != 1 or after.strip() not in rest[0]:
        raise EvaluationError(
            "the tokenizer's chat template does not show a user's message as it is, so a haystack cannot be put "
            "into it; remove the template (tokenizer.chat_template = None) to have the text continued instead"
        )
    return before, rest[0] + needle.opening, True


def make_prompt(
    tokenizer: Any,
    haystack: Haystack,
    needle: Needle,
    length: int,
    depth: float,
    random: Random,
    number: int = 0,
) -> Prompt:
    """A prompt whose tokens, the answer's included, are exactly ``length``.

    The needle stands on a line of its own at the sentence or line boundary nearest to ``depth``. The parts are
    tokenized one by one and then joined, which is what makes the length exact.

    Raises:
        EvaluationError: a length that leaves no room for text.
        CorpusError: a length beyond the haystack's.
    """
    before, after, has_bos = _around(tokenizer, needle)
    head = token_ids(tokenizer, before) if has_bos else bos_ids(tokenizer)
    hidden = token_ids(tokenizer, f"\n{needle.statement}\n")
    question, answer = token_ids(tokenizer, after), token_ids(tokenizer, needle.answer)
    room = length - len(head) - len(hidden) - len(question) - len(answer)
    if room < 1:
        raise EvaluationError(
            f"a length of {length} tokens has no room for text: question, needle and answer take {length - room}"
        )
    left, right = haystack.run(room, random).split(depth)
    return Prompt(
        kind=needle.kind,
        number=number,
        length=length,
        depth=depth,
        needle_at=len(head) + len(left),
        text=(*head, *left, *hidden, *right),
        question=tuple(question),
        answer=tuple(answer),
        answer_text=needle.answer.strip(),
    )


def make_prompts(
    tokenizer: Any,
    haystack: Haystack,
    *,
    kinds: Sequence[NeedleKind],
    lengths: Sequence[int],
    depths: Sequence[float],
    n_needles: int,
    seed: int = 0,
) -> list[Prompt]:
    """Every cell's prompts, shortest first; each has a needle and a piece of text of its own.

    Args:
        n_needles: of each kind in a cell (a length and a depth).
        seed: with the cell it decides everything, so that a cell stays as it is when others are added.

    Raises:
        EvaluationError: see `make_prompt`, and depths outside of 0 to 1.
        CorpusError: see `make_prompt`.
    """
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise EvaluationError(f"depths are shares from 0 to 1, got {', '.join(f'{d:g}' for d in outside)}")
    prompts = []
    for length in sorted(set(lengths)):
        for number in range(n_needles):
            for kind in kinds:
                for depth in sorted(set(depths)):
                    random = Random(f"{seed}/{kind.name}/{number}/{length}/{depth:.6f}")
                    needle = kind.draw(random)
                    prompts.append(make_prompt(tokenizer, haystack, needle, length, depth, random, number))
    return prompts
