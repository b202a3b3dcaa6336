"""A real Redis and a server that speaks S3, as `scripts/services` sets them up."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path


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


def redis_server(services: Path, folder: Path, *options: str) -> Server:
    """An empty Redis that writes nothing to the disk; ``services`` is where the programs are."""
    port = free_port()
    program = str(services / "redis-server")
    return Server(
        [program, "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no", *options],
        port,
    )


def s3_server(services: Path) -> Server:
    """One that speaks S3, without a bucket."""
    port = free_port()
    return Server([str(services / "moto/bin/moto_server"), "--host", "127.0.0.1", "--port", str(port)], port)


def s3_environment(server: Server) -> dict[str, str]:
    """What its users would set."""
    return {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_REGION": "us-east-1",
    }


def put(server: Server, path: str, body: bytes = b"") -> None:
    """Write an object as any other client would."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data=body, method="PUT")
    # moto wants to see one, and looks no closer.
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=name/20260101/us-east-1/s3/aws4_request")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
