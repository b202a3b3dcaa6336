#!/usr/bin/env python3
"""The Python tests with the lowest and the newest transformers that pyproject.toml admits.

    make test-compat
    make test-compat ARGS="-k crop"

The registry is asked each time, so a new release is tested without an edit; without a network, it is the version that
was found last. A version lies in .venv/compat, which Python searches before .venv: transformers, and only those of its
dependencies that .venv has in another version, as hard links to uv's cache. torch is always that of .venv. Arguments go
to pytest. Exit status 1 if either version failed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON_DIR = Path(__file__).resolve().parents[1] / "python"
VENV = Path(sys.prefix)
COMPAT = VENV / "compat" / f"python{sys.version_info.major}.{sys.version_info.minor}"

# The page that it compares is written with the locked version.
LEFT_OUT = "tests/conformance/test_models_table.py"

RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
# In an overlay: the packages that it takes from .venv, with their versions.
TAKEN = ".taken-from-venv"


class CompatError(Exception):
    """A version cannot be tested; the message says why."""


def say(text: str) -> None:
    print(f"test-compat: {text}", flush=True)


def installed() -> dict[str, str]:
    """Versions of the packages in .venv."""
    found = metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return {canonicalize_name(package.name): package.version for package in found}


def admitted() -> tuple[str, list[str]]:
    """The range of transformers, as it is written, and all else that goes with it in pyproject.toml."""
    project = tomllib.loads((PYTHON_DIR / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = {Requirement(line).name: line for line in [*extras["torch"], *extras["gguf"]]}
    return requirements.pop("transformers").removeprefix("transformers"), list(requirements.values())


def uv(*arguments: str | Path, requirements: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {"UV_PYTHON_DOWNLOADS": "never", "UV_LINK_MODE": "hardlink"}
    return subprocess.run(
        [VENV / "bin/uv", "pip", *arguments, "--quiet", "--python", sys.executable],
        input="".join(f"{line}\n" for line in requirements),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def ask(choice: str, within: str) -> str | None:
    """The lowest or the newest release that the registry has now; None if it cannot be reached."""
    bare = ("--no-deps", "--no-header", "--no-annotate", "--refresh-package", "transformers")
    strategy = ("--resolution", RESOLUTIONS[choice], "--prerelease", "disallow")
    done = uv("compile", "-", *bare, *strategy, requirements=[f"transformers{within}"])
    if done.returncode == 0:
        return done.stdout.strip().removeprefix("transformers==")
    if done.returncode == 1:
        raise CompatError(f"uv finds no release of transformers{within}:\n{done.stderr.strip()}")
    return None


def is_complete(overlay: Path) -> bool:
    """Whether it was installed to the end, and .venv still has what it takes from there."""
    if not (overlay / TAKEN).exists():
        return False
    have = installed()
    pins = (line.split("==") for line in (overlay / TAKEN).read_text().splitlines())
    return all(have.get(name) == version for name, version in pins)


def install(version: str, others: list[str], overlay: Path) -> None:
    """Puts the version into its overlay; what was installed half is not taken for an overlay."""
    have = installed()
    partial = COMPAT / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    # uv keeps to the versions in its output file where it can.
    lock = partial / TAKEN
    lock.write_text("".join(f"{name}=={at}\n" for name, at in have.items() if name != "transformers"))
    wanted = [f"transformers=={version}", f"torch=={have['torch']}", *others]
    done = uv("compile", "-", "--no-header", "--no-annotate", "--output-file", lock, requirements=wanted)
    if done.returncode == 0:
        pins = [line.split(";")[0].strip() for line in lock.read_text().splitlines()]
        taken = [pin for pin in pins if have.get(pin.split("==")[0]) == pin.split("==")[1]]
        lock.write_text("".join(f"{pin}\n" for pin in taken))
        different = [pin for pin in pins if pin not in taken]
        if different:
            done = uv("install", "--no-deps", "--target", partial, *different, requirements=[])
    if done.returncode != 0:
        raise CompatError(f"uv cannot install transformers {version} beside .venv:\n{done.stderr.strip()}")
    shutil.rmtree(overlay, ignore_errors=True)
    partial.rename(overlay)


def recall(remembered: Path) -> tuple[str, str]:
    """The version that an earlier run found, and of which range."""
    text = remembered.read_text() if remembered.exists() else ""
    version, _, within = text.strip().partition(" ")
    return version, within


def prepare(choice: str) -> tuple[str, Path]:
    """The version to test, and the folder that has it."""
    within, others = admitted()
    COMPAT.mkdir(parents=True, exist_ok=True)
    remembered = COMPAT / choice
    version = ask(choice, within)
    if version is None:
        version, of = recall(remembered)
        if of != within or not is_complete(COMPAT / version):
            raise CompatError(
                f"the package registry cannot be reached and no {choice} transformers is here from an earlier run; "
                "run `make test-compat` once with a network"
            )
        say(f"the package registry cannot be reached; {version} was the {choice} when it last could be")
    overlay = COMPAT / version
    with (COMPAT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete(overlay):
            install(version, others, overlay)
        remembered.write_text(f"{version} {within}\n")
    locked = "; the locked version" if version == installed().get("transformers") else ""
    say(f"transformers {version} ({choice} of {within}{locked})")
    return version, overlay


def check_import(version: str, environment: dict[str, str]) -> None:
    """Raises CompatError unless Python imports that version, and finds its metadata."""
    code = (
        "import importlib.metadata as m, transformers as t; print(t.__version__, m.version('transformers'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PYTHON_DIR, env=environment, stdout=subprocess.PIPE, text=True)
    if done.stdout.split() != [version, version]:
        seen = done.stdout.strip() or "nothing"
        raise CompatError(f"transformers {version} is installed, but Python imports {seen}")


def run_tests(version: str, overlay: Path, arguments: list[str]) -> bool:
    """Whether the tests passed with the version."""
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{overlay}{os.pathsep}{before}" if before else str(overlay)}
    check_import(version, environment)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--ignore={LEFT_OUT}"]
    command += ["tests", *arguments]
    return subprocess.run(command, cwd=PYTHON_DIR, env=environment).returncode == 0


def main() -> int:
    if not (VENV / "bin/uv").exists():
        print("test-compat: this Python is not that of .venv; run `make test-compat`", file=sys.stderr)
        return 1
    failed = []
    for choice in RESOLUTIONS:
        name = f"the {choice} transformers"
        try:
            version, overlay = prepare(choice)
            name = f"transformers {version} ({choice})"
            if run_tests(version, overlay, sys.argv[1:]):
                continue
        except CompatError as error:
            print(f"test-compat: {error}", file=sys.stderr, flush=True)
        failed.append(name)
    if failed:
        print(f"test-compat: failed with {' and '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
