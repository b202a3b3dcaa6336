"""Prefix stores on real servers: from several processes, under load, with faults, without rights."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from cache_helpers import tokens
from kvlathe import PrefixStoreError, PrefixStoreWarning
from kvlathe._native import NativePrefixStore
from kvlathe.cli import main
from prefix_helpers import filled, store_of
from services.servers import Server, put


def redis_says(server: Server, *words: str | bytes) -> bytes:
    """One command, as any other client would give it."""
    raw = [word.encode() if isinstance(word, str) else word for word in words]
    message = b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in raw)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(message)
        return connection.recv(1 << 20)


def test_what_was_saved_is_found_to_the_bit(url: str) -> None:
    ids = tokens(100)
    assert store_of(url).save(ids, filled("llama", ids)) == 96
    store = store_of(url)
    cache, n_tokens = store.load(ids)
    assert n_tokens == 96
    in_memory = filled("llama", ids[:, :96])
    for layer, expected in zip(cache.layers, in_memory.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
    longer = torch.cat([ids, tokens(40, seed=2)], dim=1)
    assert store.save(longer, filled("llama", longer)) == 128
    assert store.statistics.n_chunks_saved == 2
    assert store.load(tokens(100, seed=5))[1] == 0


def test_the_command_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokens(100)
    store_of(url).save(ids, filled("llama", ids))
    assert main(["prefix", "list", url]) == 0
    assert "6 chunks" in capsys.readouterr().out
    assert main(["prefix", "verify", url]) == 0
    one = max(each[4] for each in NativePrefixStore(url, 20.0, None, None).list())
    assert main(["prefix", "evict", url, "--max-size", str(2 * one)]) == 0
    assert store_of(url).load(ids)[1] == 32
    assert main(["prefix", "evict", url, "--max-size", "0"]) == 0
    assert store_of(url).load(ids)[1] == 0


_WORKER = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from cache_helpers import tokens
from prefix_helpers import filled, store_of
store = store_of(sys.argv[1])
torch.manual_seed(int(sys.argv[3]))
for round in range(12):
    prefix = tokens(64, seed=int(torch.randint(0, 4, ())))
    ids = torch.cat([prefix, tokens(40, seed=100 + int(torch.randint(0, 4, ())))], dim=1)
    assert store.save(ids, filled("llama", ids)) == 96
    cache, n_tokens = store.load(ids)
    assert n_tokens == 96, n_tokens
    assert torch.equal(cache.layers[1].values, filled("llama", ids[:, :96]).layers[1].values)
assert store.statistics.n_failures == 0
"""


def test_processes_that_write_the_same_chunks_at_once(url: str) -> None:
    tests = str(Path(__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _WORKER, url, tests, str(seed)], stderr=subprocess.PIPE
        )
        for seed in range(4)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said.decode()
    assert len(NativePrefixStore(url, 20.0, None, None).list()) <= 4 * 4 + 16 * 2


def test_redis_stops_and_comes_back(redis: Server) -> None:
    url, ids = f"redis://127.0.0.1:{redis.port}", tokens(100)
    store = store_of(url, strict=False, timeout_s=3.0)
    assert store.save(ids, filled("llama", ids)) == 96 and store.load(ids)[1] == 96
    redis.stop()
    with pytest.warns(PrefixStoreWarning, match="127.0.0.1"):
        assert store.load(ids)[1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrefixStoreWarning)
        assert store.save(ids, filled("llama", ids)) == 0
    redis.start()
    deadline = time.monotonic() + 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrefixStoreWarning)
        while not store.save(ids, filled("llama", ids)):
            assert time.monotonic() < deadline
    assert store.load(ids)[1] == 96


def test_a_server_that_does_not_answer_is_given_up(redis: Server) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = store_of(f"redis://127.0.0.1:{silent.getsockname()[1]}", strict=False, timeout_s=1.0)
        began = time.monotonic()
        with pytest.warns(PrefixStoreWarning, match="within 1 s|timed out"):
            assert store.load(tokens(100))[1] == 0
        assert time.monotonic() - began < 5


def test_redis_forgets_what_nobody_uses(redis: Server) -> None:
    url, ids = f"redis://127.0.0.1:{redis.port}", tokens(100)
    store = store_of(url, max_age_s=2.0)
    store.save(ids, filled("llama", ids))
    for _ in range(4):
        time.sleep(1.0)
        # Looking is using.
        assert store.load(ids)[1] == 96
    time.sleep(3.5)
    assert store.load(ids)[1] == 0


def test_damage_in_redis_is_a_miss(redis: Server) -> None:
    url, ids = f"redis://127.0.0.1:{redis.port}", tokens(100)
    store = store_of(url, strict=False)
    store.save(ids, filled("llama", ids))
    scope, key, end, *_ = next(
        each for each in NativePrefixStore(url, 9.0, None, None).list() if each[2] == 48
    )
    name = f"kvlathe:v1/{scope}/{key}-{end}.kvl"
    assert redis_says(redis, "SETRANGE", name, "3000", b"\xff\x00\xff\x00").startswith(b":")
    with pytest.warns(PrefixStoreWarning, match="damaged"):
        assert store.load(ids)[1] == 32
    assert store.save(ids, filled("llama", ids)) == 96 and store.load(ids)[1] == 96
    assert redis_says(redis, "LPUSH", "kvlathe:v1/another kind", "x") == b":1\r\n"
    assert store.load(ids)[1] == 96


def test_damage_in_s3_is_a_miss(s3: Server) -> None:
    url, ids = "s3://caches/here", tokens(100)
    store = store_of(url, strict=False)
    store.save(ids, filled("llama", ids))
    scope, key, end, *_ = next(
        each for each in NativePrefixStore(url, 9.0, None, None).list() if each[2] == 48
    )
    put(s3, f"/caches/here/v1/{scope}/{key}-{end}.kvl", b"something else" * 100)
    with pytest.warns(PrefixStoreWarning, match="no saved cache"):
        assert store.load(ids)[1] == 32
    assert store.save(ids, filled("llama", ids)) == 96 and store.load(ids)[1] == 96


def test_a_password(locked_redis: Server, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokens(100)
    for secret, fits in (("hunter2", True), ("hunter3", False)):
        url = f"redis://:{secret}@127.0.0.1:{locked_redis.port}"
        if fits:
            store = store_of(url)
            assert store.save(ids, filled("llama", ids)) == 96 and store.load(ids)[1] == 96
            assert secret not in repr(store) + store.url
        else:
            with pytest.raises(PrefixStoreError) as refused:
                store_of(url, timeout_s=3.0).load(ids)
            assert secret not in str(refused.value)
            assert main(["prefix", "list", url, "--timeout", "3"]) == 1
            assert secret not in "".join(capsys.readouterr())


def test_a_bucket_that_is_not_there(s3: Server) -> None:
    ids = tokens(100)
    with pytest.raises(PrefixStoreError, match="nowhere") as refused:
        store_of("s3://nowhere/at/all").save(ids, filled("llama", ids))
    assert "hunter2" not in str(refused.value)
    assert store_of("s3://nowhere/at/all", strict=False).load(ids)[1] == 0


def test_without_credentials(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    began = time.monotonic()
    store = store_of("s3://caches/x", strict=False, timeout_s=2.0)
    with pytest.warns(PrefixStoreWarning):
        assert store.load(tokens(100))[1] == 0
    assert time.monotonic() - began < 10
