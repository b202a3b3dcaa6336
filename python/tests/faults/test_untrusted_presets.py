"""Preset files from strangers, through every public door: a typed error, soon, with little memory, no other file read.

What single fields may hold is tested in test_bad_input.py; the reader itself in crates/kvlathe-preset.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_helpers import model_of, preset_of, seed_preset, tokens
from kvlathe import CompressedDynamicCache, Preset, PresetError, load_preset_cache, verify
from kvlathe.cli import main

_MB = 2**20


def _safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _parts() -> tuple[dict[str, Any], bytes]:
    """Header and data of a good file."""
    whole = bytes(preset_of("llama", 4.0).native.to_safetensors())
    n = struct.unpack_from("<Q", whole)[0]
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


def _changed_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, data = _parts()
    change(header)
    return _safetensors(header, data)


def _changed_meta(change: Callable[[dict[str, Any]], object]) -> bytes:
    def in_header(header: dict[str, Any]) -> None:
        meta = json.loads(header["__metadata__"]["kvlathe"])
        change(meta)
        header["__metadata__"]["kvlathe"] = json.dumps(meta)

    return _changed_header(in_header)


def _changed_tensor(name: str, **changes: Any) -> bytes:
    return _changed_header(lambda header: header[name].update(changes))


def _offsets_of(name: str) -> list[int]:
    return list(_parts()[0][name]["data_offsets"])


def _renamed(name: str) -> bytes:
    return _changed_header(lambda header: header.update({name: header.pop(_BASIS)}))


def _lengthen(items: list[Any]) -> None:
    items *= 100_000


def _with_nan(name: str) -> bytes:
    header, data = _parts()
    begin, end = header[name]["data_offsets"]
    bad = np.full((end - begin) // 2, np.nan, np.float16).tobytes()
    return _safetensors(header, data[:begin] + bad + data[end:])


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return io.open, (str(self.path), "w")


def _torch_saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _json(**changes: Any) -> bytes:
    return json.dumps({**seed_preset(2, 4, 16, 12), **changes}).encode()


_BASIS = "layers.0.key.basis"
_WEIGHTS = {"lm_head.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
_CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda folder: pickle.dumps(_Bomb(folder / "exploded")),
    "old pickle": lambda folder: pickle.dumps(_Bomb(folder / "exploded"), 0),
    "torch file": lambda folder: _torch_saved({"bomb": _Bomb(folder / "exploded")}),
    "numpy": lambda _: b"\x93NUMPY\x01\x00" + b"v" * 200,
    "gguf": lambda _: b"GGUF" + bytes(100),
    "web page": lambda _: b"<!DOCTYPE html><html></html>",
    "lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "shell script": lambda _: b"#!/bin/sh\ntouch exploded\n",
    "zeros": lambda _: bytes(100_000),
    "ones": lambda _: b"\xff" * 100_000,
    "json of spaces": lambda _: b" " * 100_000,
    "deep json": lambda _: b'{"a":' * 50_000,
    "deep lists": lambda _: b'{"layers":' + b"[" * 50_000,
    "many numbers": lambda _: b'{"layers":[[' + b"0," * 500_000 + b"0]]}",
    "a long key": lambda _: b'{"' + b"k" * _MB + b'": 1}',
    "a long number": lambda _: b'{"rank": ' + b"9" * 100_000 + b"}",
    "twice the rank": lambda _: b'{"rank": 12, ' + _json()[1:],
    "twice the layers": lambda _: _json()[:-1] + b', "layers": []}',
    "lone surrogate": lambda _: b'{"model": "\\ud800"}',
    "utf-16": lambda _: _json().decode().encode("utf-16"),
    "nan in json": lambda _: _json(compression_ratio=float("nan")),
    "huge counts": lambda _: _json(n_layers=2**40, n_heads=2**40, head_dim=2**20, rank=2**20),
    "largest counts": lambda _: _json(n_layers=4096, n_heads=1024, head_dim=1024, rank=1024),
    "negative counts": lambda _: _json(n_layers=-2),
    "floats for counts": lambda _: _json(rank=1e300),
    "no header": lambda _: _safetensors(b""),
    "a header of lists": lambda _: _safetensors(b"[]"),
    "a header beyond the file": lambda _: _safetensors({}, length=2**40),
    "a header of 100 MB": lambda _: _safetensors(b"{", length=99_999_999),
    "the largest header": lambda _: _safetensors({}, length=2**64 - 1),
    "a header cut off": lambda _: _safetensors(b'{"__metadata__": {"kvlathe": "'),
    "a model's weights": lambda _: _safetensors(_WEIGHTS, b"\0"),
    "twice the metadata": lambda _: _safetensors(b'{"__metadata__": {"kvlathe": "{}"}, "__metadata__": {}}'),
    "metadata of an array": lambda _: _safetensors({"__metadata__": {"kvlathe": "[]"}}),
    "metadata that is no json": lambda _: _safetensors({"__metadata__": {"kvlathe": "rank: 12"}}),
    "a huge shape": lambda _: _changed_tensor(_BASIS, shape=[2**40, 16, 16]),
    "an overflowing shape": lambda _: _changed_tensor(_BASIS, shape=[2**63, 2**63, 16]),
    "an empty shape": lambda _: _changed_tensor(_BASIS, shape=[]),
    "another shape": lambda _: _changed_tensor(_BASIS, shape=[2, 256, 1]),
    "another type": lambda _: _changed_tensor(_BASIS, dtype="BF16"),
    "a type of twice the size": lambda _: _changed_tensor(_BASIS, dtype="F32"),
    "an unknown type": lambda _: _changed_tensor(_BASIS, dtype="OBJECT"),
    "offsets beyond the file": lambda _: _changed_tensor(_BASIS, data_offsets=[0, 2**50]),
    "offsets in reverse": lambda _: _changed_tensor(_BASIS, data_offsets=[100, 0]),
    "negative offsets": lambda _: _changed_tensor(_BASIS, data_offsets=[-8, 0]),
    "offsets of another tensor": lambda _: _changed_tensor(_BASIS, data_offsets=_offsets_of("layers.1.key.basis")),
    "a missing tensor": lambda _: _changed_header(lambda header: header.pop(_BASIS)),
    "a tensor of layer 10^9": lambda _: _renamed(f"layers.{10**9}.key.basis"),
    "a path for a name": lambda _: _renamed("../../etc/passwd"),
    "nan in the basis": lambda _: _with_nan(_BASIS),
    "nan in the mean": lambda _: _with_nan("layers.1.value.mean"),
    "nan in U": lambda _: _with_nan("layers.0.value.shared.u"),
    "more layers than tensors": lambda _: _changed_meta(lambda meta: meta.update(n_layers=3)),
    "a rotation that is not there": lambda _: _changed_meta(lambda meta: meta.update(layer_rope=[5, 0])),
    "layers without end": lambda _: _changed_meta(lambda meta: meta.update(layer_rope=[0] * 1_000_000)),
    "rotations without end": lambda _: _changed_meta(lambda meta: _lengthen(meta["kvlathe"]["rope"])),
    "sinks without end": lambda _: _changed_meta(lambda meta: meta["kvlathe"].update(n_sinks=2**31)),
    "a block length of the codec's not": lambda _: _changed_meta(lambda meta: meta["kvlathe"].update(block_len=0)),
    "a version to come": lambda _: _changed_meta(lambda meta: meta["kvlathe"].update(format_version=10**6)),
}  # fmt: skip


def _write(folder: Path, content: bytes, extension: str) -> Path:
    path = folder / f"preset.{extension}"
    path.write_bytes(content)
    return path


_DOORS: dict[str, Callable[[Path], object]] = {
    "Preset.load": Preset.load,
    "load_preset_cache": lambda path: load_preset_cache(str(path), 2, "cpu"),
    "from_preset": lambda path: CompressedDynamicCache.from_preset(
        Preset.load(path), model=model_of("llama"), uncompressed_tail=0
    ),
}


def _refused(door: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(PresetError) as caught:
        door(path)
    return str(caught.value)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Python opens meanwhile."""
    names: list[str] = []
    before = builtins.open

    def note(file: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(file))
        return before(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", note)
    yield names


@pytest.mark.parametrize("name", _CONTENTS)
def test_contents_that_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    content = _CONTENTS[name](tmp_path)
    for extension in ("json", "safetensors", "pkl"):
        path = _write(tmp_path, content, extension)
        opened.clear()
        messages = [_refused(door, path) for door in _DOORS.values()]
        # One sentence or two, whatever the file holds.
        assert all(20 < len(message) < 1000 for message in messages), messages
        assert main(["show", str(path)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ")
        assert "Traceback" not in captured.err
        assert not opened
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("command", ["verify", "eval", "needle", "tune"])
def test_commands_that_take_a_preset(
    tmp_path: Path, command: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, _CONTENTS["pickle"](tmp_path), "safetensors")
    text = tmp_path / "text.txt"
    text.write_text("Seven mice ran away.\n\n" * 500)
    options = {
        "verify": [str(path), "--text", str(text)],
        "tune": ["--calibrated", str(path), "--text", str(text), "--target-kld", "0.01"],
    }.get(command, ["--preset", str(path)])
    output = [] if command == "verify" else ["--output", str(tmp_path / "out.safetensors")]
    assert main([command, *options, "--model", str(model_folder), *output]) == 1
    assert "pickle, which kvlathe never opens" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


# Files that are no files, or no end of them. In a process without torch, whose memory shows what the reader takes.

_SPECIAL = """
import json, os, resource, sys, threading, time
from kvlathe import Preset, PresetError
from kvlathe.cli import main

folder = sys.argv[1]


def path(name):
    return os.path.join(folder, name)


os.mkfifo(path("fifo.safetensors"))
os.mkdir(path("folder.safetensors"))
os.symlink("/etc/passwd", path("passwd.safetensors"))
os.symlink("/dev/zero", path("zero.json"))
os.symlink(path("loop.json"), path("loop.json"))
os.symlink(path("nothing"), path("dangling.json"))
os.symlink(path("fifo.safetensors"), path("to-fifo.json"))
# As many bytes as a preset may have at most, a good beginning, and nothing on the disk.
header = json.dumps({"__metadata__": {"kvlathe": "{}"}}).encode()
for name, size, start in (
    ("sparse-10g.safetensors", 10 * 2**30, b""),
    ("sparse-1g.safetensors", 2**30, b""),
    ("sparse-1g.json", 2**30, b""),
    ("spaces.json", 2**29, b" " * 8192),
    ("weights.safetensors", 12 * 2**30, len(header).to_bytes(8, "little") + header),
):
    with open(path(name), "wb") as file:
        file.write(start)
        file.truncate(size)
names = [path(name) for name in sorted(os.listdir(folder))]
names += ["/dev/zero", "/dev/null", "/dev/urandom", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/", ""]
names += [path("nul" + chr(0) + "byte"), path("x" * 5000), path("no/such/file.json")]
try:
    Preset.load(path("no.json"))
except PresetError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = []
for name in names:
    start = time.process_time()
    try:
        Preset.load(name)
        outcome = "read"
    except PresetError as error:
        outcome = str(error)
    if chr(0) not in name:
        assert main(["show", name]) == 1
    outcomes.append([name, outcome, time.process_time() - start])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"outcomes": outcomes, "grown_kb": grown, "torch": "torch" in sys.modules}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs pipes, devices and /proc")
def test_files_that_are_no_files(tmp_path: Path) -> None:
    """A pipe that nobody writes to, devices without end, sparse gigabytes, links to elsewhere."""
    command = [sys.executable, "-c", _SPECIAL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["outcomes"]) >= 20 and not found["torch"]
    for name, outcome, seconds in found["outcomes"]:
        assert outcome != "read", name
        # The processor's time, the command line's included.
        assert seconds < 1.0, (name, seconds)
        # Nothing of what another file holds.
        assert "root:" not in outcome and "PATH=" not in outcome
    assert found["grown_kb"] < 8 * 1024
    messages = {os.path.basename(name): outcome for name, outcome, _ in found["outcomes"]}
    for name in ("fifo.safetensors", "to-fifo.json", "zero.json"):
        assert "a pipe or a device" in messages[name]
    assert "a folder" in messages["folder.safetensors"]


# Presets that can be read, and say strange things of themselves.


def _odd(tmp_path: Path, **meta: Any) -> Path:
    """A good preset whose free text is the stranger's."""

    def change(content: dict[str, Any]) -> None:
        content.update({k: v for k, v in meta.items() if k == "model"})
        content["kvlathe"].update({k: v for k, v in meta.items() if k != "model"})

    return _write(tmp_path, _changed_meta(change), "safetensors")


@pytest.mark.parametrize(
    "measured",
    [
        {"kld": 0.1},
        {"kld": "much", "top1": [], "perplexity": None, "confidence": {}, "n_positions": "many"},
        {"kld": 10**300, "top1": -5, "perplexity": True, "text": "\x1b[2Jcleared"},
        {"text": "../../../etc/passwd", "kld": [[[[]]]]},
    ],
    ids=["missing", "types", "numbers", "path"],
)
def test_show_prints_what_it_can(
    tmp_path: Path, measured: dict[str, Any], capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    path = _odd(tmp_path, measured=measured, model="/etc/passwd\x1b]0;owned\x07\r" + "x" * 100_000)
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "model            /etc/passwd\\x1b]0;owned\\x07\\rxx" in shown
    assert len(shown) < 2000 and shown.replace("\n", "").isprintable()
    assert not opened


def test_a_model_that_does_not_fit_is_named_without_its_escapes(
    tmp_path: Path, model_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _odd(tmp_path, model="good\x1b[31m", fingerprint="0" * 64, cache_fingerprint="0" * 64)
    command = ["verify", str(path), "--model", str(model_folder), "--text", str(text_file)]
    assert main([*command, "--target-kld", "1"]) == 1
    error = capsys.readouterr().err
    assert "good\\x1b[31m" in error and "\x1b" not in error


@pytest.mark.parametrize(
    "measured",
    [
        {"target_kld": "0.1"},
        {"target_kld": [1]},
        {"target_ppl_delta": -1},
        {"target_ppl_delta": True},
        {"target_kld": 1.0, "tail": "16"},
        {"target_kld": 1.0, "tail": -4},
        {"target_kld": 1.0, "tail": 2.5},
        {"target_kld": 1.0, "tail": [16]},
    ],
    ids=str,
)
def test_promises_that_are_none(tmp_path: Path, measured: dict[str, Any]) -> None:
    preset = Preset.load(_odd(tmp_path, measured=measured))
    with pytest.raises(PresetError, match="expected a number"):
        verify(model_of("llama"), None, [], preset)


def test_names_are_never_opened(tmp_path: Path, opened: list[str]) -> None:
    """A preset names a model, a text and a fingerprint; none of them is a way to a file."""
    victim = tmp_path / "victim"
    victim.write_text("secret")
    path = _odd(
        tmp_path,
        model=str(victim),
        model_type=str(victim),
        created=str(victim),
        calibration={"text": str(victim), "n_tokens": str(victim)},
        measured={"text": str(victim)},
    )
    opened.clear()
    preset = Preset.load(path)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=0)
    with torch.no_grad():
        model_of("llama")(tokens(30), past_key_values=cache)
    assert str(victim) not in opened and "secret" not in repr(preset)
    assert preset.meta["model"] == str(victim)
