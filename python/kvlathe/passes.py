"""Whose turn it is with a cache: a pass through the model must find all layers alike, and nobody else there.

A pass adds tokens to one layer after another. If another thread comes in between, or an exception ends a pass early,
layers hold different numbers of tokens, and a model that went on with them would write nonsense without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from .errors import CacheStateError

_ADVICE = "give each thread a cache of its own (copy.deepcopy shares the packed blocks), or reset() this one"


@dataclass
class Pass:
    """A pass through the model that has asked for its mask.

    Attributes:
        n_tokens: what every layer held at that time; None once another thread has emptied the cache.
        n_layers: how many layers it will update.
        updated: layers that have their new tokens.
    """

    n_tokens: int | None
    n_layers: int
    updated: set[int] = field(default_factory=set)


class Passes:
    """The passes through a cache, by thread, and who works on the cache right now.

    Nothing here waits, so an exception at any point cannot leave a lock behind that nobody opens: whoever comes second
    gets an error. What a dead pass has left stays with its own thread until `crop` or `reset`.
    """

    def __init__(self) -> None:
        self._open: dict[int, Pass] = {}
        # At most one entry; `setdefault` is atomic.
        self._holder: dict[str, int] = {}

    def begin(self, n_tokens: int, n_layers: int) -> None:
        """This thread's model has asked for its mask; what an earlier pass of the thread has left is forgotten."""
        self._refuse_others("a pass")
        self._open[get_ident()] = Pass(n_tokens, n_layers)

    @property
    def current(self) -> Pass | None:
        """This thread's pass, if its model has asked for a mask."""
        return self._open.get(get_ident())

    def note(self, current: Pass, layer: int) -> None:
        """A layer has its new tokens; with the last one this thread's pass is over."""
        current.updated.add(layer)
        if len(current.updated) >= current.n_layers:
            self.end()

    def end(self) -> None:
        """This thread's pass is over, or forgotten."""
        self._open.pop(get_ident(), None)

    @contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Keep other threads out meanwhile.

        Raises:
            CacheStateError: another thread is at work on the cache, or in the middle of a pass.
        """
        thread = get_ident()
        if self._holder.get("thread") == thread:
            # Called by ourselves, or an interrupt came before the last call could let go.
            yield
            return
        if self._holder.setdefault("thread", thread) != thread:
            raise CacheStateError(f"{doing} while another thread works on the same cache; {_ADVICE}")
        try:
            self._refuse_others(doing)
            yield
        finally:
            self._holder.pop("thread", None)

    def _refuse_others(self, doing: str) -> None:
        thread = get_ident()
        if any(owner != thread and other.updated for owner, other in list(self._open.items())):
            raise CacheStateError(
                f"{doing} while another thread is in the middle of a pass through the model with the same cache, or "
                f"broke off there; {_ADVICE}"
            )

    def after_reset(self) -> Passes:
        """What holds once the cache has been emptied: passes that other threads are in the middle of cannot go on."""
        fresh, thread = Passes(), get_ident()
        for owner, other in list(self._open.items()):
            if owner != thread and other.updated:
                fresh._open[owner] = Pass(None, other.n_layers)
        return fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()
