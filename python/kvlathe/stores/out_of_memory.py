"""torch's way to say that there is no memory, as an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ResourceError


def raise_if_out_of_memory(error: Exception, n_tokens: int) -> None:
    """torch has no class of its own for the CPU's memory.

    Raises:
        ResourceError: instead of ``error``, if that is what it says.
    """
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        raise ResourceError(
            f"out of memory: torch could not expand or code {n_tokens} tokens of one layer; the layer is as it was, so "
            f"free memory and try again, or load the model with attn_implementation='sdpa', where nothing is expanded"
        ) from error


@contextmanager
def as_resource_error(n_tokens: int) -> Iterator[None]:
    """`raise_if_out_of_memory` of what happens meanwhile."""
    try:
        yield
    except RuntimeError as error:
        raise_if_out_of_memory(error, n_tokens)
        raise
