"""Whose turn it is with a cache: a pass through the model must find all layers alike, and nobody else there.

A pass adds tokens to one layer after another. If another thread comes in between, or an exception ends a pass early,
layers hold different numbers of tokens, and a model that went on with them would write nonsense without a word.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from transformers import Cache

from ..errors import CacheStateError

_ADVICE = "give each thread a cache of its own (copy.deepcopy shares the packed blocks), or reset() this one"

# How long another thread may take to leave `generate`: a streamer tells its reader of the end a little before.
_PATIENCE_SECONDS = 0.3


@dataclass
class Pass:
    """A pass through the model that has asked for its mask.

    Attributes:
        n_tokens: what every layer held at that time; None once another thread has emptied the cache.
        n_layers: how many layers it will update, if the model leaves none out.
        updated: layers that have their new tokens.
    """

    n_tokens: int | None
    n_layers: int
    updated: set[int] = field(default_factory=set)


def _is_of(given: Any, cache: Any) -> bool:
    """Whether something is the cache, or an encoder-decoder's that has it."""
    return isinstance(given, Cache) and getattr(given, "self_attention_cache", given) is cache


def _generates(thread: int, cache: Any) -> bool:
    """Whether a thread is in transformers' `generate` with this cache."""
    # Its frames say so, as nothing else does. A call's end reaches no cache, and a thread that lives may be between two
    # passes or long done with them (a pool's); of what lives as long as the call, a kept traceback keeps all alive.
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith(
            "transformers."
        ):
            # By whatever name it was given: that changes from release to release.
            held = list(frame.f_locals.values())
            held += [value for each in held if isinstance(each, dict) for value in list(each.values())]
            if any(_is_of(each, cache) for each in held):
                return True
        frame = frame.f_back
    return False


def tokens_of_each(held: Sequence[tuple[int, int]]) -> int:
    """How many tokens layers hold that must be alike; 0 without any.

    Args:
        held: tokens and rows of each layer that is not empty.

    Raises:
        CacheStateError: they are unlike.
    """
    if len(set(held)) > 1:
        tokens, rows = ({layer[at] for layer in held} for at in range(2))
        unlike = f"{min(tokens)} to {max(tokens)} tokens" if len(tokens) > 1 else f"batches of {sorted(rows)}"
        raise CacheStateError(
            f"layers of this cache hold {unlike}: a pass through the model, or another call, was cut short by an "
            f"exception or mixed up with another thread's; crop(0) removes the tokens of such a pass unless it "
            f"was the cache's first, reset() empties the cache"
        )
    return held[0][0] if held else 0


class Passes:
    """The passes through a cache, by thread, and who works on the cache right now.

    There is no lock that an exception at the wrong moment could leave closed: whoever comes second gets an error.
    What a dead pass has left stays with its own thread until `crop` or `reset`.
    """

    def __init__(self) -> None:
        self._open: dict[int, Pass] = {}
        # Whose pass was the last to begin.
        self._latest = get_ident()
        # What each thread takes the cache to hold: what it last saw there, or has left there itself.
        self._seen: dict[int, int] = {}
        # At most one entry; `setdefault` is atomic.
        self._holder: dict[str, int] = {}
        # Threads that look at all layers, for as many calls each. They may do so together.
        self._lookers: dict[int, int] = {}

    def see(self, n_tokens: int | None) -> None:
        """This thread knows how many tokens the cache holds; None: it has to look again."""
        if n_tokens is None:
            self._seen.pop(get_ident(), None)
        else:
            self._seen[get_ident()] = n_tokens

    def await_generation(self, cache: Any) -> None:
        """Between two passes of another thread's `generate` all layers are alike, but the tokens are that thread's."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while self._latest != get_ident() and _generates(self._latest, cache):
            if time.monotonic() > until:
                raise CacheStateError(
                    f"a pass through the model while another thread generates with the same cache; {_ADVICE}"
                )
            time.sleep(_PATIENCE_SECONDS / 30)

    def begin(self, n_tokens: int, n_layers: int) -> None:
        """This thread's model has asked for its mask; what an earlier pass of the thread has left is forgotten."""
        self._refuse_others("a pass through the model")
        seen = self._seen.get(get_ident(), n_tokens)
        if seen != n_tokens:
            # `generate` looks once, and then counts for itself.
            self.see(None)
            raise CacheStateError(
                f"the cache holds {n_tokens} tokens, and {seen} when this thread last saw it: another thread uses the "
                f"same cache; {_ADVICE}"
            )
        self._open[get_ident()] = Pass(n_tokens, n_layers)
        self._latest = get_ident()

    @property
    def current(self) -> Pass | None:
        """This thread's pass, if its model has asked for a mask."""
        return self._open.get(get_ident())

    def note(self, current: Pass, layer: int, n_tokens: int) -> None:
        """A layer has its new tokens, and holds ``n_tokens``; with the last layer this thread's pass is over."""
        current.updated.add(layer)
        self.see(n_tokens)
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
        outermost = not self.is_held
        try:
            self.enter(doing)
            yield
        finally:
            if outermost:
                self.leave()

    @property
    def is_held(self) -> bool:
        """Whether this thread keeps others out already."""
        return self._holder.get("thread") == get_ident()

    @contextmanager
    def unchanged(self, doing: str) -> Iterator[None]:
        """Keep other threads from changing anything meanwhile; any number of threads may look at once.

        Raises:
            CacheStateError: as for `alone`.
        """
        thread, lookers = get_ident(), self._lookers
        lookers[thread] = lookers.get(thread, 0) + 1
        try:
            # Whoever changes something does it the other way round, so that one of two sees the other.
            if self._holder.get("thread", thread) != thread:
                raise CacheStateError(f"{doing} while another thread works on the same cache; {_ADVICE}")
            self._refuse_others(doing)
            yield
        finally:
            if lookers[thread] == 1:
                del lookers[thread]
            else:
                lookers[thread] -= 1

    def enter(self, doing: str) -> None:
        """As `alone`, for what every layer does in every step; `leave` must follow, whatever comes in between, where
        the thread had not been in before.

        Raises:
            CacheStateError: as for `alone`.
        """
        thread = get_ident()
        if self._holder.get("thread") == thread:
            return
        if self._holder.setdefault("thread", thread) != thread:
            raise CacheStateError(f"{doing} while another thread works on the same cache; {_ADVICE}")
        try:
            if self._lookers and any(looker != thread for looker in list(self._lookers)):
                raise CacheStateError(f"{doing} while another thread copies the same cache; {_ADVICE}")
            self._refuse_others(doing)
        except BaseException:  # an interrupt, too
            self.leave()
            raise

    def leave(self) -> None:
        """Let other threads in again, if it was this one that kept them out."""
        if self.is_held:
            self._holder.pop("thread", None)

    def _refuse_others(self, doing: str) -> None:
        thread = get_ident()
        passes = self._open
        if not passes or (len(passes) == 1 and thread in passes):
            return
        if any(owner != thread and other.updated for owner, other in list(passes.items())):
            raise CacheStateError(
                f"{doing} while another thread is in the middle of a pass through the model with the same cache, or "
                f"broke off there; {_ADVICE}"
            )

    def after_reset(self) -> Passes:
        """What holds once the cache has been emptied: what other threads are in the middle of cannot go on."""
        fresh, thread = Passes(), get_ident()
        fresh._seen = {owner: seen for owner, seen in list(self._seen.items()) if owner != thread}
        for owner, other in list(self._open.items()):
            if owner != thread and other.updated:
                fresh._open[owner] = Pass(None, other.n_layers)
        return fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return Passes()
