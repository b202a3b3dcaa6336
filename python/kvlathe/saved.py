"""How caches, and what they are made of, are written to files: a maker's name, and plain data that it checks.

`torch.load` calls no function that it was not told of. It is told of one of ours, as soon as kvlathe and torch have
both been imported, whichever comes first; kvlathe does not import torch for that. No class of ours stands in a file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

from .errors import KvlatheError, PicklingError

_Maker = TypeVar("_Maker", bound=Callable[..., Any])

_MAKERS: dict[str, Callable[..., Any]] = {}
_TORCH = "torch.serialization"

# What makers meet in data that is not what they expect. No memory is another matter.
_MISFITS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def maker(name: str) -> Callable[[_Maker], _Maker]:
    """Says of a function that it makes what files call ``name``, of data that it does not trust."""

    def note(make: _Maker) -> _Maker:
        _MAKERS[name] = make
        return make

    return note


def by_maker(name: str, *data: Any) -> tuple[Any, ...]:
    """What `__reduce__` returns."""
    return import_kvlathe_first, (name, *data)


def import_kvlathe_first(name: str, *data: Any) -> Any:
    """Makes again what a file holds. torch shows this name to whoever loads a file without having imported kvlathe.

    Raises:
        PicklingError: a file that is damaged, or of another version of kvlathe.
        KvlatheError: what the maker refuses.
    """
    if str(name) not in _MAKERS:
        # It brings all makers but those that need no torch.
        importlib.import_module(".cache", __package__)
    make = _MAKERS.get(str(name))
    if make is None:
        raise PicklingError(
            f"the file holds a {name!r}, which this version of kvlathe does not know; load it with the version that "
            f"wrote it"
        )
    try:
        return make(*data)
    except KvlatheError:
        raise
    except _MISFITS as error:
        raise PicklingError(
            f"the {name} in this file cannot be made again ({error}): the file is damaged, or was written by another "
            f"version of kvlathe; save the cache again"
        ) from error


def tell_torch() -> None:
    """Let `torch.load` read our files, now or when torch is imported."""
    if _TORCH in sys.modules:
        _tell(sys.modules[_TORCH])
    elif not any(type(finder).__qualname__ == _Watch.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _tell(serialization: ModuleType) -> None:
    # A torch that is too old to be told is too old for caches, too, which will say so.
    with suppress(AttributeError):
        serialization.add_safe_globals([import_kvlathe_first])


class _Watch(MetaPathFinder):
    """Waits for torch to be imported: then its module is found and loaded as always, and told."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TORCH:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                break
        else:
            return None
        load = getattr(spec.loader, "exec_module", None)

        def load_and_tell(module: ModuleType) -> None:
            assert load is not None
            load(module)
            _tell(module)

        if load is not None:
            # A loader that takes no attributes loads without us.
            with suppress(AttributeError):
                spec.loader.exec_module = load_and_tell  # type: ignore[union-attr, method-assign]
        return spec
