"""Transforms, recorders and traces of operations: to them a tensor is more than its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def is_watched() -> bool:
    """Whether somebody transforms, records or traces what is done right now: torch.func, make_fx, torch.jit.trace,
    forward-mode gradients.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


@contextmanager
def unwatched() -> Iterator[None]:
    """Meanwhile operations are done and no more: what comes of them are constants to whoever watches."""
    if not is_watched():
        yield
        return
    tracing = torch._C._get_tracing_state()
    with torch._C._DisableFuncTorch(), _disable_current_modes():
        if tracing is not None:
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if tracing is not None:
                torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
