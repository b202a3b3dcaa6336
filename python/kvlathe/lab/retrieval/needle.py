"""Needles: facts that a text cannot help to guess, how they are asked for, and their answers.

The words come from short lists and every choice from a seed, so a needle is the same on every machine. Lists rather
than the user's text: a sentence of a book may be known to the model, and would be answered without being found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random

from ...errors import EvaluationError

_CITIES = (
    "Lisbon Oslo Cairo Lima Prague Seoul Dublin Nairobi Hanoi Vienna Quito Warsaw Athens Madrid Zagreb Tunis "
    "Riga Havana Bogota Ankara".split()
)
_PEOPLE = (
    "Anna Boris Clara David Elena Felix Grace Henry Irene Jonas Karen Louis Maria Peter Simon Tessa".split()
)
_COLOURS = (
    "amber violet silver crimson golden purple scarlet ivory copper orange bronze green yellow white".split()
)
_ANIMALS = (
    "falcon otter beaver lizard spider turtle badger donkey parrot salmon tiger monkey rabbit eagle".split()
)
_THINGS = "anchor lantern basket hammer bottle ladder mirror pillow ribbon saddle candle window button barrel".split()
_DEEDS = "carried painted followed repaired borrowed dropped polished measured admired buried".split()
_PLACES = (
    "across the frozen lake|behind the old station|under the stone bridge|near the quiet harbour|"
    "inside the empty theatre|along the northern road|above the village square|beside the broken fountain"
).split("|")


@dataclass(frozen=True)
class Needle:
    """One fact.

    Attributes:
        kind: name of its kind.
        statement: the line that is hidden in the text.
        question: what is asked after the text.
        opening: the first words of the reply, given to the model so that it need not choose a form.
        answer: what comes next, word by word as in the statement, with the space before it.
    """

    kind: str
    statement: str
    question: str
    opening: str
    answer: str


class NeedleKind(ABC):
    """A sort of fact.

    Attributes:
        name: for options and results.
        about: half a sentence for people.
    """

    name: str
    about: str

    @abstractmethod
    def draw(self, random: Random) -> Needle:
        """A needle of this kind."""


class Number(NeedleKind):
    """A number of five digits that belongs to a city."""

    name = "number"
    about = "a number of five digits that belongs to a city"

    def draw(self, random: Random) -> Needle:
        opening = f"The special magic number of {random.choice(_CITIES)} is"
        answer = f" {random.randrange(10_000, 100_000)}"
        city = opening.split()[-2]
        return Needle(
            self.name, f"{opening}{answer}.", f"What is the special magic number of {city}?", opening, answer
        )


class Fact(NeedleKind):
    """Two words that belong to a person."""

    name = "fact"
    about = "two words that belong to a person"

    def draw(self, random: Random) -> Needle:
        person = random.choice(_PEOPLE)
        opening = f"The secret password of {person} is"
        answer = f" {random.choice(_COLOURS)} {random.choice(_ANIMALS)}"
        return Needle(
            self.name, f"{opening}{answer}.", f"What is the secret password of {person}?", opening, answer
        )


class Sentence(NeedleKind):
    """A whole sentence, to be copied word by word."""

    name = "sentence"
    about = "a whole sentence, to be copied word by word"

    def draw(self, random: Random) -> Needle:
        person, place = random.choice(_PEOPLE), random.choice(_PLACES)
        opening = f"The note of {person} says:"
        answer = (
            f" The {random.choice(_COLOURS)} {random.choice(_ANIMALS)} {random.choice(_DEEDS)} "
            f"a {random.choice(_COLOURS)} {random.choice(_THINGS)} {place}."
        )
        question = f"What does the note of {person} say? Copy it word by word."
        return Needle(self.name, f"{opening}{answer}", question, opening, answer)


#: Every kind, by name, in the order of tables.
KINDS: dict[str, NeedleKind] = {kind.name: kind for kind in (Number(), Fact(), Sentence())}


def kinds_named(names: list[str]) -> list[NeedleKind]:
    """The kinds of those names, each once.

    Raises:
        EvaluationError: an unknown name.
    """
    if unknown := [name for name in names if name not in KINDS]:
        raise EvaluationError(
            f"there are no needles of the kind {', '.join(unknown)}; there are {', '.join(KINDS)}"
        )
    return [KINDS[name] for name in dict.fromkeys(names)]
