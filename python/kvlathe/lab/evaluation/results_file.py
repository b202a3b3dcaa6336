"""A file of results, one a line, that an interrupted run goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ...errors import EvaluationError


class Keyed(Protocol):
    """A result that is found again by a digest of all that it depends on."""

    @property
    def key(self) -> str: ...

    def to_json(self) -> str:
        """One line."""
        ...


Line = TypeVar("Line", bound=Keyed)

# A cut line is told from another kind of file by how results begin.
_LINE_BEGINS = '{"key": "'


class ResultsFile(Generic[Line]):
    """JSON Lines, one line a result, appended as soon as it is measured.

    Args:
        path: need not exist. A last line that an interruption cut short is dropped, once there is a new result.
        parse: reads a line; raises ValueError, KeyError or TypeError for one that is no such result.
        command: whose results these are, for messages: "kvlathe eval".

    Raises:
        EvaluationError: the file holds something else, or cannot be read or written.
    """

    def __init__(self, path: Path, parse: Callable[[str], Line], command: str) -> None:
        self.path = path
        self._parse = parse
        self._command = command
        self._found: dict[str, Line] = {}
        # Of a last line that was cut short, where it begins and how long the file was; and what ends a whole one.
        self._cut: tuple[int, int] | None = None
        self._line_end = ""
        try:
            content = path.read_bytes() if path.exists() else b""
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"cannot read the results in {path}: {error}") from error
        whole, _, last = text.rpartition("\n")
        lines = whole.splitlines()
        for number, line in enumerate(lines, start=1):
            self._add(line, number)
        if last and _is_cut(last):
            self._cut = (len(content) - len(last.encode()), len(content))
        elif last:
            self._add(last, len(lines) + 1)
            self._line_end = "\n"

    def _add(self, line: str, number: int) -> None:
        try:
            result = self._parse(line)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{self.path}, line {number}, is no result of this version of {self._command} ({error}); "
                f"name another --output or remove the file"
            ) from error
        self._found[result.key] = result

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Line | None:
        """The result of that key, if it has been measured."""
        return self._found.get(key)

    def append(self, result: Line) -> None:
        """Write a result; it is on the disk when this returns."""
        try:
            if self._cut is not None:
                begins_at, n_bytes = self._cut
                if self.path.stat().st_size != n_bytes:
                    raise EvaluationError(f"{self.path} has changed meanwhile; does another run write to it?")
                os.truncate(self.path, begins_at)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line_end + result.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EvaluationError(f"cannot write to {self.path}: {error}") from error
        self._cut, self._line_end = None, ""
        self._found[result.key] = result


def _is_cut(line: str) -> bool:
    """Whether this is the beginning of a result, not a whole one and not somebody else's line."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(_LINE_BEGINS) or _LINE_BEGINS.startswith(line)
    return False


def dataclass_from(kind: Any, content: dict[str, Any]) -> Any:
    """A frozen dataclass of ours from JSON, whose lists were tuples.

    Raises:
        KeyError: other fields than the dataclass has.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    if set(content) != known:
        raise KeyError(f"{kind.__name__} with fields {sorted(content)}, expected {sorted(known)}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in content.items()})
