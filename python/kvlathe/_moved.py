"""Old import paths. `kvlathe.evaluation` is now `kvlathe.lab.evaluation`: importing either gives the same module.

Nothing is loaded until somebody imports an old path. To move a module or a name, add a line here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOT = __name__.rpartition(".")[0]

# Within kvlathe: where a module was, and where it and all that is in it are now.
MODULES = {
    "baselines": "lab.baselines",
    "corpus": "calibration.text.corpus",
    "evaluation": "lab.evaluation",
    "evaluation.quality": "calibration.quality.evaluator",
    "fisher": "calibration.fisher",
    "replay": "calibration.replay",
    "retrieval": "lab.retrieval",
    "rope_probe": "calibration.rope_probe",
    "sampled_text": "calibration.text.sampled_text",
    "sensitivity": "calibration.sensitivity",
    "token_windows": "calibration.text.token_windows",
    "tuning": "calibration.tuning",
    "two_sided": "calibration.quality.two_sided",
    "verification": "calibration.verification",
    "window_length": "calibration.text.window_length",
}

# Names of a package that stays, and the module where each is now. The package's `__getattr__` asks `moved_name`.
NAMES = {
    "calibration.CalibrationOptions": "calibration.basis",
    "calibration.calibrate": "calibration.basis",
    "cli.tune_main": "legacy.auto_tune",
}


def new_path(path: str) -> str | None:
    """Where the module of this old path is now; None for a path that is not old."""
    head, rest = path.removeprefix(f"{_ROOT}."), ""
    if head == path:
        return None
    while head not in MODULES:
        head, dot, last = head.rpartition(".")
        if not dot:
            return None
        rest = f".{last}{rest}"
    return f"{_ROOT}.{MODULES[head]}{rest}"


def moved_name(package: str, name: str) -> Any:
    """What a package's old name stands for.

    Raises:
        AttributeError: it never had such a name.
    """
    home = NAMES.get(f"{package.removeprefix(f'{_ROOT}.')}.{name}")
    if home is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{_ROOT}.{home}"), name)


class _Redirection(MetaPathFinder, Loader):
    """Answers the import of an old path with the module at the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = new_path(fullname)
        return None if new is None else ModuleSpec(fullname, self, origin=new)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        module = importlib.import_module(spec.origin)
        # The import system is about to write the old path's spec into the module.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def redirect_imports() -> None:
    """Let old paths be imported, from now on."""
    if not any(type(finder).__qualname__ == _Redirection.__qualname__ for finder in sys.meta_path):
        # In front: the usual finder would load a moved package's modules a second time, under their old paths.
        sys.meta_path.insert(0, _Redirection())
