"""Text to calibrate on and text to judge on, never the same document on both sides.

The default corpus is what every CPython carries: the language reference in ``pydoc_data.topics`` and
docstrings as prose, and the standard library's files as source code, about half and half.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ...errors import CorpusError

_SKIPPED_FOLDERS = frozenset(
    "test tests idlelib lib2to3 encodings site-packages dist-packages pydoc_data turtledemo ensurepip "
    "__pycache__ __phello__ lib-dynload msilib".split()
)
_TEXT_SUFFIXES = frozenset(
    ".txt .md .markdown .rst .tex .html .csv .json .jsonl .yaml .yml .toml .py .pyi .rs .c .h .cc .cpp .hpp "
    ".cu .go .java .kt .js .ts .tsx .rb .php .cs .swift .scala .sh .sql .lua .r .jl .hs .ml .pl".split()
)
_HEADING = re.compile(r"(?m)^ ?(?:= [^=\n].* = ?|#{1,2} \S.*)$")
_MIN_SECTION = 2000
_MIN_DOCUMENT = 200
_MIN_DOCSTRING = 400


@dataclass(frozen=True)
class Document:
    """A named text.

    Attributes:
        kind: "prose", "source" or "text" (unknown).
        section_of: name of the text it was cut from, if any.
    """

    name: str
    text: str
    kind: str = "text"
    section_of: str = ""


@dataclass(frozen=True)
class Corpus:
    """Named documents, split in two by document.

    Attributes:
        calibration: documents to calibrate on.
        held_out: documents to judge on.
    """

    name: str
    calibration: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def __post_init__(self) -> None:
        both = {d.name for d in self.calibration} & {d.name for d in self.held_out}
        held_out_texts = {d.text for d in self.held_out}
        both |= {d.name for d in self.calibration if d.text in held_out_texts}
        if both:
            raise CorpusError(f"documents on both sides of the split: {', '.join(sorted(both)[:5])}")

    @classmethod
    def from_documents(
        cls, name: str, documents: Iterable[Document], *, seed: int = 0, calibration_fraction: float = 0.5
    ) -> Corpus:
        """Split by a hash of each document's name and the seed; of documents with equal text one is kept.

        Adding or removing documents leaves the others on their sides, unless a side would otherwise be empty.

        Raises:
            CorpusError: fewer than two different documents, or names that repeat.
        """
        _check_fraction(calibration_fraction)
        unique = list({document.text: document for document in documents}.values())
        if len(unique) < 2:
            raise CorpusError(
                f"a split needs at least 2 different documents, corpus {name!r} has {len(unique)}"
            )
        if len({document.name for document in unique}) < len(unique):
            raise CorpusError(f"corpus {name!r} has two documents of the same name")
        ranked = sorted(unique, key=lambda document: rank(document.name, seed))
        count = sum(rank(document.name, seed) < calibration_fraction for document in ranked)
        count = min(max(count, 1), len(ranked) - 1)
        return cls(name, tuple(ranked[:count]), tuple(ranked[count:]))


def rank(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on name and seed only, alike on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise CorpusError(f"calibration_fraction must lie between 0 and 1, got {fraction}")


def _topics() -> list[Document]:
    """The language reference's topics, one document each."""
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:
        return []
    topics: dict[str, str] = module.topics
    return [
        Document(f"topics/{name}", text, "prose")
        for name, text in sorted(topics.items())
        if len(text) >= _MIN_DOCUMENT
    ]


def _library_files(root: Path) -> list[str]:
    """The standard library's Python files, relative to its folder, sorted."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith(("config-", "."))
        )
        found += [(Path(folder) / f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    return sorted(found)


def _docstrings(source: str) -> str:
    """The longer docstrings of a module, its own first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in texts if text and len(text) >= _MIN_DOCSTRING)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def default_corpus(
    *, seed: int = 0, calibration_fraction: float = 0.5, characters: int = 1_600_000
) -> Corpus:
    """The running CPython's reference prose and standard library, half and half.

    Args:
        characters: about how much text in all; half is prose, topics first, then docstrings of modules that
            do not appear as source.

    Raises:
        CorpusError: this Python was installed without topics and library sources.
    """
    documents = _topics()
    prose = sum(len(document.text) for document in documents)
    source = 0
    half = max(characters // 2, prose)
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(_library_files(root), key=lambda file: rank(file, seed)):
        if prose >= half and source >= half:
            break
        text = _read(root / name)
        if text is None or len(text) < _MIN_SECTION:
            continue
        if source < half:
            documents.append(Document(f"stdlib/{name}", text, "source"))
            source += len(text)
        elif len(text := _docstrings(text)) >= _MIN_DOCUMENT:
            documents.append(Document(f"docstrings/{name}", text, "prose"))
            prose += len(text)
    if len(documents) < 2:
        raise CorpusError(
            f"this Python carries no documentation topics and no library sources (looked in {root})"
        )
    return Corpus.from_documents("cpython", documents, seed=seed, calibration_fraction=calibration_fraction)


def _sections(name: str, text: str) -> list[Document]:
    """Cut a text at headings, or at blank lines if it has none, into sections of 2,000 characters or more."""
    starts = [match.start() for match in _HEADING.finditer(text)]
    if len(starts) < 2:
        starts = [match.end() for match in re.finditer(r"\n[ \t]*\n+", text)]
    cuts = [0]
    for start in starts:
        if start - cuts[-1] >= _MIN_SECTION:
            cuts.append(start)
    if len(cuts) > 1 and len(text) - cuts[-1] < _MIN_SECTION:
        cuts.pop()
    bounds = zip(cuts, [*cuts[1:], len(text)], strict=True)
    return [Document(f"{name}#{i:05d}", text[a:b], section_of=name) for i, (a, b) in enumerate(bounds)]


def _text_files(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[str, Path]]:
    """(name, path) of every file named, and of the text files in every folder named."""
    files: list[tuple[str, Path]] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            files.append((path.name, path))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _TEXT_SUFFIXES)
            hidden = {p for p in inside if any(part.startswith(".") for part in p.relative_to(path).parts)}
            files += [(p.relative_to(path).as_posix(), p) for p in inside if p not in hidden]
        else:
            raise CorpusError(f"no such file or folder: {path}")
    names = [name for name, _ in files]
    return [(name if names.count(name) == 1 else str(path), path) for name, path in files]


def corpus_from_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    calibration_fraction: float = 1 / 3,
    seed: int = 0,
) -> Corpus:
    """A corpus of plain text, Markdown or source files, or of all such files in folders.

    Several files are split by file. A single file is cut into sections, at headings (``= Title =``, ``#
    Title``) or blank lines, and its first ``calibration_fraction`` calibrates: neighbouring sections are
    about the same thing, so a split at random would not be one by document.

    Raises:
        CorpusError: a path that does not exist, no readable text, or a single file too short to split.
    """
    _check_fraction(calibration_fraction)
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    texts = [(name, text) for name, path in _text_files(given) if (text := _read(path)) and text.strip()]
    label = ", ".join(Path(path).name for path in given)
    if not texts:
        raise CorpusError(f"no readable UTF-8 text in {label or 'no paths'}")
    if len(texts) > 1:
        documents = [Document(name, text) for name, text in texts]
        return Corpus.from_documents(label, documents, seed=seed, calibration_fraction=calibration_fraction)
    name, text = texts[0]
    sections = _sections(name, text)
    if len(sections) < 2:
        raise CorpusError(
            f"{name} has {len(text)} characters, at least {2 * _MIN_SECTION} are needed to split it"
        )
    middles, done = [], 0
    for section in sections:
        middles.append(done + len(section.text) / 2)
        done += len(section.text)
    count = min(max(sum(m < calibration_fraction * done for m in middles), 1), len(sections) - 1)
    known = {section.text for section in sections[:count]}
    return Corpus(label, tuple(sections[:count]), tuple(s for s in sections[count:] if s.text not in known))


def halves(
    documents: Sequence[Document], *, seed: int = 0
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Two sides of about equal length, of different documents; one text, whole or in sections, is cut in the middle."""
    if len(documents) == 1:
        (only,) = documents
        middle = len(only.text) // 2
        cut = (only.text[:middle], only.text[middle:])
        first, second = (Document(f"{only.name}#{i}", text, only.kind) for i, text in enumerate(cut))
        return (first,), (second,)
    if len({document.section_of for document in documents}) == 1 and documents[0].section_of:
        # Neighbouring sections are about the same thing.
        ends = list(accumulate(len(document.text) for document in documents))
        n_first = sum(end <= ends[-1] / 2 for end in ends)
        n_first = min(max(n_first, 1), len(documents) - 1)
        known = {document.text for document in documents[:n_first]}
        rest = tuple(document for document in documents[n_first:] if document.text not in known)
        return tuple(documents[:n_first]), rest
    sides: tuple[list[Document], list[Document]] = ([], [])
    lengths = [0, 0]
    for document in sorted(documents, key=lambda document: rank(document.name, seed)):
        shorter = int(lengths[1] < lengths[0])
        sides[shorter].append(document)
        lengths[shorter] += len(document.text)
    return tuple(sides[0]), tuple(sides[1])
