"""Servers as their users run them. `make test-services` sets them up and says where they are."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_FOLDER = os.environ.get("KVLATHE_SERVICES")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _FOLDER is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs servers: make test-services"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A program that listens.

    Attributes:
        command: that starts it.
        port: where it listens.
    """

    command: list[str]
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, f"{self.command} ended with {self.process.returncode}"
                time.sleep(0.05)
        raise AssertionError(f"{self.command} does not listen")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _redis(folder: Path, *options: str) -> Server:
    port = free_port()
    program = f"{_FOLDER}/redis-server"
    return Server(
        [program, "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no", *options],
        port,
    )


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    """An empty Redis that writes nothing to the disk."""
    server = _redis(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[Server]:
    """One that wants a password."""
    server = _redis(tmp_path, "--requirepass", "hunter2")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that speaks S3, with a bucket called "caches", and the environment that its users would set."""
    port = free_port()
    server = Server([f"{_FOLDER}/moto/bin/moto_server", "--host", "127.0.0.1", "--port", str(port)], port)
    server.start()
    for name, value in {
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    put(server, "/caches")
    yield server
    server.stop()


def put(server: Server, path: str, body: bytes = b"") -> None:
    """Write an object as any other client would."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data=body, method="PUT")
    # moto wants to see one, and looks no closer.
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=name/20260101/us-east-1/s3/aws4_request")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


@pytest.fixture(params=["redis", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """Of an empty store, on each of them."""
    server: Server = request.getfixturevalue(request.param)
    return f"redis://127.0.0.1:{server.port}/3" if request.param == "redis" else "s3://caches/of/models"
