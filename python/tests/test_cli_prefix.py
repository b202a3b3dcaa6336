"""`kvlathe prefix`: what a store holds, whether it is whole, and less of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cache_helpers import model_of, preset_of, tokens
from kvlathe import CompressedDynamicCache, PrefixStore
from kvlathe.cli import main
from kvlathe.model_identity import model_identity


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store of two models: six chunks of one, of the other two with windows."""
    url = (tmp_path / "prefixes").as_uri()
    for name, n_tokens in (("llama", 100), ("gemma3", 40)):
        store = PrefixStore(url, preset_of(name), model=model_of(name), chunk_len=16, strict=True)
        store.generate(input_ids=tokens(n_tokens), max_new_tokens=1)
    return url


def files(url: str) -> list[Path]:
    return sorted(Path(url.removeprefix("file://")).rglob("*.kvl"))


def test_list_and_show(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefix", "list", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["scope", "model", "preset"]
    assert len(lines) == 4 and lines[-1].startswith("10 chunks, ")
    assert main(["prefix", "list", "--json", url]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of_llama = next(row for row in rows if row["model"] == "tiny llama")
    assert of_llama["preset"] == preset_of("llama").digest
    assert (of_llama["n_chunks"], of_llama["longest_prefix_tokens"]) == (6, 96)
    assert sum(row["n_bytes"] for row in rows) == sum(path.stat().st_size for path in files(url))

    assert main(["prefix", "show", url, of_llama["scope"][:9]]) == 0
    shown = capsys.readouterr().out
    assert model_identity(model_of("llama")) in shown and "80 to 96" in shown and "2 full" in shown
    assert main(["prefix", "show", "--json", url, of_llama["scope"][:9].upper()]) == 0
    chunk = json.loads(capsys.readouterr().out.splitlines()[0])
    assert chunk["end"] == chunk["header"]["n_tokens"] == 16
    assert main(["prefix", "show", url, chunk["key"][:12]]) == 0
    assert "0 to 16" in capsys.readouterr().out
    assert main(["prefix", "show", url, "no such thing"]) == 1
    assert "no such thing" in capsys.readouterr().err


def test_verify_names_what_is_damaged(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefix", "verify", url]) == 0
    assert "10 chunks" in capsys.readouterr().err
    damaged, renamed, other = files(url)[:3]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    renamed.write_bytes(other.read_bytes())
    assert main(["prefix", "verify", url]) == 1
    told = capsys.readouterr()
    assert damaged.name[:12] in told.out and "another chunk" in told.out and "2 damaged" in told.err
    assert damaged.exists() and renamed.exists()


def test_evict(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefix", "evict", url]) == 2
    assert "--max-size" in capsys.readouterr().err and len(files(url)) == 10
    assert main(["prefix", "evict", url, "--max-size", "1GB", "--max-age", "2h"]) == 0
    assert len(files(url)) == 10
    one = max(path.stat().st_size for path in files(url))
    assert main(["prefix", "evict", url, "--max-size", f"{3 * one}"]) == 0
    assert 3 <= len(files(url)) < 10
    assert main(["prefix", "evict", url, "--max-size", "0"]) == 0
    assert files(url) == []
    assert main(["prefix", "list", url]) == 0
    assert "holds no prefixes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "here"], "file:///folder"),
        (["list", "s3://"], "bucket"),
        (["verify", "redis://127.0.0.1:1", "--timeout", "1"], "127.0.0.1:1"),
    ],
)
def test_stores_that_are_none(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefix", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--max-size", "20 horses"], ["--max-age", "3"], ["--max-age", "-1d"]])
def test_limits_that_are_none(arguments: list[str], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prefix", "evict", url, *arguments])
    assert ended.value.code == 2 and len(files(url)) == 10


def test_looking_at_a_store_needs_no_torch(url: str) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from kvlathe.cli import main
sys.exit(main(["prefix", "list", {url!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and "10 chunks" in ended.stdout, ended.stderr


def test_a_cache_of_a_found_prefix_says_whose_it_is(url: str, tmp_path: Path) -> None:
    """What `save` writes of it names the weights."""
    model = model_of("llama")
    store = PrefixStore(url, preset_of("llama"), chunk_len=16, uncompressed_tail=0)
    cache, n_tokens = store.load(tokens(100), model=model)
    assert n_tokens == 96
    cache.save(tmp_path / "cache.kvl")
    assert CompressedDynamicCache.load(tmp_path / "cache.kvl", model=model).get_seq_length() == 96
    assert model_identity(model).encode() in (tmp_path / "cache.kvl").read_bytes()
