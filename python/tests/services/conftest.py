"""Servers as their users run them. `make test-services` sets them up and says where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.servers import Server, put, redis_server, s3_environment, s3_server

_FOLDER = os.environ.get("KVLATHE_SERVICES")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _FOLDER is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs servers: make test-services"))


def _services() -> Path:
    assert _FOLDER is not None
    return Path(_FOLDER)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    """An empty Redis that writes nothing to the disk."""
    server = redis_server(_services(), tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def locked_redis(tmp_path: Path) -> Iterator[Server]:
    """One that wants a password."""
    server = redis_server(_services(), tmp_path, "--requirepass", "hunter2")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that speaks S3, with a bucket called "caches", and the environment that its users would set."""
    server = s3_server(_services())
    server.start()
    for name, value in s3_environment(server).items():
        monkeypatch.setenv(name, value)
    put(server, "/caches")
    yield server
    server.stop()


@pytest.fixture(params=["redis", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """Of an empty store, on each of them."""
    server: Server = request.getfixturevalue(request.param)
    return f"redis://127.0.0.1:{server.port}/3" if request.param == "redis" else "s3://caches/of/models"
