"""What works without torch, and what an unsuitable transformers is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvlathe import _requirements
from kvlathe._requirements import check_transformers

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_presets_can_be_inspected_without_torch() -> None:
    done = _run(
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import kvlathe, pathlib\n"
        "folder = pathlib.Path(kvlathe.__file__).parent / 'presets'\n"
        "preset = kvlathe.Preset.load(next(folder.glob('*.safetensors')))\n"
        "print(preset, preset.with_bits(3.0).bits_per_value, preset.codec(0, 'key').bits_per_value)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize("name", ["CompressedDynamicCache", "calibrate", "attach", "load_preset_cache"])
def test_what_needs_torch_says_so(missing: str, name: str) -> None:
    done = _run(f"import sys; sys.modules[{missing!r}] = None\nfrom kvlathe import {name}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "ImportError" in last and f"kvlathe.{name} needs" in last and "pip install 'kvlathe[torch]'" in last
    )


@pytest.mark.parametrize("found", ["4.57.6", "5.0.0", "5.19.0", "6.0.0.dev0"])
def test_another_transformers_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(_requirements.importlib.metadata, "version", lambda _: found)
    with pytest.raises(ImportError, match=f"but {re.escape(found)} is installed") as error:
        check_transformers()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("found", ["5.20.0", "5.23.0", "5.24.0.dev0"])
def test_transformers_of_the_range_is_accepted(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(_requirements.importlib.metadata, "version", lambda _: found)
    check_transformers()


def test_the_range_is_that_of_the_package() -> None:
    oldest = ".".join(map(str, _requirements.OLDEST_TRANSFORMERS))
    assert f'"transformers>={oldest},<{_requirements.FIRST_UNTESTED_MAJOR}"' in PYPROJECT.read_text()
