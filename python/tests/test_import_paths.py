"""Where things are imported from: the run time apart from the rest, and old paths beside the new ones."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys

import pytest

import kvlathe
import kvlathe.calibration
import kvlathe.cli
import kvlathe.legacy.auto_tune
from kvlathe import _moved

OLD_MODULES = [
    *_moved.MODULES,
    "baselines.kivi",
    "baselines.rank_int8",
    "evaluation.method",
    "evaluation.plots",
    "evaluation.run",
    "retrieval.caches",
    "retrieval.run",
]


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _loaded(program: str) -> set[str]:
    """The modules of kvlathe that are loaded when a program has run."""
    return set(
        _run(f"{program}\nimport sys; print(*(n for n in sys.modules if n.startswith('kvlathe')))").split()
    )


def test_importing_kvlathe_loads_what_presets_need() -> None:
    loaded = _loaded("import kvlathe; dir(kvlathe)")
    assert loaded == {
        f"kvlathe{name}"
        for name in ("", "._moved", "._native", "._requirements", ".errors", ".preset", ".saved")
    }


RUN_TIME = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kvlathe import CompressedDynamicCache, Preset, load_preset_cache
from kvlathe.presets import smollm2

config = LlamaConfig(vocab_size=64, hidden_size=576, intermediate_size=64, num_hidden_layers=30,
                     num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(64, (1, 300))
for cache in (load_preset_cache(smollm2(), num_layers=30, device="cpu"),
              CompressedDynamicCache.from_preset(Preset.load(smollm2()))):
    model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.get_memory_stats()["compressed_tokens"] > 0
    cache.crop(-20)
    cache.reset()
"""


def test_the_run_time_loads_nothing_of_the_rest() -> None:
    loaded = _loaded(RUN_TIME)
    assert "kvlathe.cache" in loaded
    apart = ("kvlathe.lab", "kvlathe.calibration", "kvlathe.legacy", "kvlathe.cli")
    assert not [name for name in loaded if name.startswith(apart)]


def test_calibration_loads_nothing_of_the_laboratory() -> None:
    loaded = _loaded("from kvlathe import Evaluator, calibrate, corpus_from_files, tune, verify")
    assert "kvlathe.calibration.tuning" in loaded
    assert not [name for name in loaded if name.startswith(("kvlathe.lab", "kvlathe.legacy", "kvlathe.cli"))]


def test_text_is_read_without_torch() -> None:
    _run("import sys; sys.modules['torch'] = None\nfrom kvlathe.calibration.text import corpus")


@pytest.mark.parametrize("order", ["old first", "new first"])
def test_an_old_path_gives_the_module_itself_whichever_comes_first(order: str) -> None:
    program = "import kvlathe, sys\n"
    for path in ("evaluation.run", "rope_probe", "tuning"):
        old, new = f"kvlathe.{path}", _moved.new_path(f"kvlathe.{path}")
        first, second = (old, new) if order == "old first" else (new, old)
        program += (
            f"import {first} as first\nimport {second} as second\n"
            f"assert first is second is kvlathe.{path} is sys.modules[{old!r}] is sys.modules[{new!r}]\n"
            f"assert first.__name__ == first.__spec__.name == {new!r}, first.__spec__\n"
        )
    _run(program)


@pytest.mark.parametrize("path", OLD_MODULES)
def test_old_paths_of_modules(path: str) -> None:
    old, new = f"kvlathe.{path}", _moved.new_path(f"kvlathe.{path}")
    assert new is not None
    module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__spec__ is not None and module.__spec__.name == new
    assert importlib.util.find_spec(old) is not None


@pytest.mark.parametrize("path", sorted(_moved.NAMES))
def test_old_paths_of_names(path: str) -> None:
    package, _, name = path.rpartition(".")
    here = getattr(importlib.import_module(f"kvlathe.{package}"), name)
    assert here is getattr(importlib.import_module(f"kvlathe.{_moved.NAMES[path]}"), name)


def test_old_modules_are_attributes_of_the_package() -> None:
    _run("import kvlathe; assert kvlathe.evaluation.Evaluator is kvlathe.Evaluator")


def test_what_was_pickled_under_an_old_path_is_read() -> None:
    assert pickle.loads(b"ckvlathe.tuning\nTuneOptions\n.") is kvlathe.TuneOptions


def test_paths_that_never_were_are_refused() -> None:
    for path in ("kvlathe.evaluations", "kvlathe.evaluation.nothing", "kvlathe.corpus.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(path)
    for module in (kvlathe, kvlathe.calibration, kvlathe.cli):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_public_names_are_listed_and_are_there() -> None:
    assert set(kvlathe.__all__) <= set(dir(kvlathe))
    for name in kvlathe.__all__:
        assert getattr(kvlathe, name) is not None
