"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import pytest
import torch

from kvlathe import Preset
from kvlathe.errors import ModelError
from kvlathe.model_loading import LoadedModel, load_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, and a busy machine then disturbs timings and rounding least."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M in float32; converted at the first use only and kept in kvlathe's cache folder."""
    try:
        return load_model("smollm2")
    except ModelError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bundled_preset() -> Preset:
    """The preset of that model which comes with the package."""
    with resources.as_file(resources.files("kvlathe") / "presets/smollm2-135m-instruct.safetensors") as path:
        return Preset.load(path)
