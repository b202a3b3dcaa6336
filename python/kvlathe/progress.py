"""Progress bars with time left, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """Iterate with a bar on stderr that shows the time left; silent when stderr is not a terminal, or over one item."""
    total = len(items) if isinstance(items, Sized) else None
    if not sys.stderr.isatty() or total == 1:
        yield from items
        return
    from tqdm import tqdm

    # `delay`: nothing flashes up for work that is done within two seconds.
    yield from tqdm(items, desc=what, unit=unit, total=total, delay=2.0, dynamic_ncols=True, leave=False)


def weighted_progress(items: Sequence[T], weights: Sequence[float], what: str, unit: str) -> Iterator[T]:
    """`progress` over items of unequal work, ``weights`` of a ``unit`` each; those of weight 0 cost nothing."""
    if not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left, {rate_fmt}"
    with tqdm(
        desc=what,
        unit=unit,
        unit_scale=True,
        total=round(sum(weights)),
        delay=2.0,
        dynamic_ncols=True,
        leave=False,
        bar_format=form,
    ) as bar:
        for item, weight in zip(items, weights, strict=True):
            yield item
            bar.update(weight)


@contextmanager
def loading_bars_on_terminals_only() -> Iterator[None]:
    """transformers draws bars while it loads a model; not where stderr is not a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    logging.disable_progress_bar()
    # The bar over the tensors of a GGUF file does not ask whether bars are wanted.
    bar: Any = getattr(gguf_reader, "tqdm", None)
    if bar is not None:
        gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logging.enable_progress_bar()
        if bar is not None:
            gguf_reader.tqdm = bar
