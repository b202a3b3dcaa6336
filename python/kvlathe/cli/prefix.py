"""``kvlathe prefix``: what a store of prefixes holds, whether it is whole, and less of it."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .._native import NativePrefixStore
from ..errors import PrefixStoreError
from ..progress import progress
from .options import positive, printable, say

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Stored:
    """One object of a store.

    Attributes:
        scope: 32 hex digits, of one model, preset and tenant.
        key: 64 hex digits.
        end: position behind its last token.
        is_window: whether it holds layers with sliding windows, not those of full attention.
        n_bytes: its size.
        used_at: seconds since 1970.
    """

    scope: str
    key: str
    end: int
    is_window: bool
    n_bytes: int
    used_at: float

    @property
    def name(self) -> tuple[str, str, int, bool]:
        """As native code wants it."""
        return self.scope, self.key, self.end, self.is_window


def add_prefix_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvlathe prefix``."""
    parser.description = "Look at a store of prefixes (kvlathe.PrefixStore), check it, and make it smaller."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _action(
        actions, "list", _list, "models and presets that the store holds prefixes of, and their sizes"
    )
    listing.add_argument("--json", action="store_true", help="for programs: one object a line")
    show = _action(actions, "show", _show, "what one chunk, or the chunks of one scope, hold")
    show.add_argument(
        "name", help="the first digits of a scope or of a chunk's key, as `list` and `show` print them"
    )
    show.add_argument("--json", action="store_true", help="for programs: one object a line")
    _action(
        actions,
        "verify",
        _verify,
        "read everything and compare all checksums; exit status 1 if some is damaged",
    )
    evict = _action(actions, "evict", _evict, "remove what was used longest ago")
    evict.add_argument("--max-size", type=_size, help="bytes that may stay, such as 500MB or 20GB")
    evict.add_argument("--max-age", type=_age, help="keep what was used within this time, such as 12h or 30d")


def _action(actions: Any, name: str, act: Any, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}."
    )
    parser.add_argument(
        "url", help="file:///folder, s3://bucket/prefix, redis://host; credentials from the environment"
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=30.0,
        metavar="SECONDS",
        help="for one answer (default %(default)s)",
    )
    parser.set_defaults(act=act)
    return parser


def run_prefix(arguments: argparse.Namespace) -> int:
    """``kvlathe prefix``: works without torch."""
    status: int = arguments.act(arguments)
    return status


def _opened(arguments: argparse.Namespace, **limits: Any) -> NativePrefixStore:
    return NativePrefixStore(
        arguments.url, arguments.timeout, limits.get("max_bytes"), limits.get("max_age_s")
    )


def _stored(store: NativePrefixStore) -> list[Stored]:
    """Everything, scope by scope, the beginnings of prefixes first."""
    return sorted((Stored(*each) for each in store.list()), key=lambda each: (each.scope, each.end, each.key))


def _header(store: NativePrefixStore, stored: Stored) -> dict[str, Any]:
    """What a chunk says of itself; nothing if it is gone or cannot be read."""
    try:
        found = store.read(*stored.name)
    except PrefixStoreError:
        return {}
    header: dict[str, Any] = json.loads(found.header_json()) if found is not None else {}
    return header


def _list(arguments: argparse.Namespace) -> int:
    store = _opened(arguments)
    scopes: dict[str, list[Stored]] = defaultdict(list)
    for each in _stored(store):
        scopes[each.scope].append(each)
    rows: list[dict[str, Any]] = []
    for scope, objects in scopes.items():
        header = _header(store, objects[0])
        rows.append(
            {
                "scope": scope,
                "model": printable(str(header.get("model", "?"))),
                "preset": str(header.get("preset", "?")),
                "n_chunks": len(objects),
                "longest_prefix_tokens": max(each.end for each in objects),
                "n_bytes": sum(each.n_bytes for each in objects),
                "n_hits": store.hits(scope),
                "used_at": max(each.used_at for each in objects),
            }
        )
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    if not rows:
        say(f"{store.url} holds no prefixes")
        return 0
    table = [["scope", "model", "preset", "chunks", "longest, tokens", "size", "hits", "last used"]]
    for row in rows:
        table.append(
            [
                row["scope"][:12],
                row["model"],
                row["preset"][:12],
                f"{row['n_chunks']:,}",
                f"{row['longest_prefix_tokens']:,}",
                _bytes(row["n_bytes"]),
                "?" if row["n_hits"] is None else f"{row['n_hits']:,}",
                _ago(row["used_at"]),
            ]
        )
    _print_table(table)
    print(f"{sum(row['n_chunks'] for row in rows):,} chunks, {_bytes(sum(row['n_bytes'] for row in rows))}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    store = _opened(arguments)
    name = arguments.name.lower()
    found = [each for each in _stored(store) if each.scope.startswith(name) or each.key.startswith(name)]
    if not name or not found:
        say(f"error: {store.url} holds no scope and no chunk that begins with {printable(arguments.name)!r}")
        return 1
    rows = [(each, _header(store, each)) for each in found]
    if arguments.json:
        for each, header in rows:
            print(json.dumps({**asdict(each), "header": header}))
        return 0
    first = next((header for _, header in rows if header), {})
    for title, key in (
        ("model", "model"),
        ("preset", "preset"),
        ("weights", "weights"),
        ("written by", "library_version"),
    ):
        print(f"{title:<12} {printable(str(first.get(key, '?')))}")
    table = [["chunk", "tokens", "layers", "size", "last used"]]
    for each, header in rows:
        layers = header.get("layers", [])
        held = sum(layer is not None for layer in layers)
        kind = "windows" if each.is_window else "full"
        start = header.get("first_token_id", 0) if header else "?"
        table.append(
            [
                each.key[:12],
                f"{start} to {each.end}",
                f"{held} {kind}",
                _bytes(each.n_bytes),
                _ago(each.used_at),
            ]
        )
    _print_table(table)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = _opened(arguments)
    objects, n_bad = _stored(store), 0
    for each in progress(objects, "checking", "chunk"):
        try:
            found = store.read(*each.name)
            said = None if found is None else json.loads(found.header_json())
            wrong = said is not None and (said.get("chunk_key"), said["n_tokens"]) != (each.key, each.end)
            problem = "it holds another chunk than its name says" if wrong else None
        except PrefixStoreError as error:
            problem = str(error)
        if problem is not None:
            n_bad += 1
            print(f"{each.scope[:12]} {each.key[:12]}: {printable(problem)}")
    say(
        f"{len(objects):,} chunks, {_bytes(sum(each.n_bytes for each in objects))}: {n_bad or 'none'} damaged"
    )
    return 1 if n_bad else 0


def _evict(arguments: argparse.Namespace) -> int:
    if arguments.max_size is None and arguments.max_age is None:
        say("error: say what may stay: --max-size 20GB, --max-age 30d, or both")
        return 2
    store = _opened(arguments, max_bytes=arguments.max_size, max_age_s=arguments.max_age)
    n_objects, n_bytes = store.evict()
    say(f"removed {n_objects:,} chunks, {_bytes(n_bytes)}")
    return 0


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected a number of bytes, or one such as 500MB or 20GB"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; expected one such as 90s, 30m, 12h or 30d")
    return float(found[1]) * _TIMES[found[2]]


def _bytes(n: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def _ago(used_at: float) -> str:
    seconds = max(0.0, time.time() - used_at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
