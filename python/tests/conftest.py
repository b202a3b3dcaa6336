"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvlathe import Preset
from kvlathe.errors import ModelError
from kvlathe.model_loading import LoadedModel, load_model
from tiny_models import tiny


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
    with resources.as_file(
        resources.files("kvlathe") / "presets/smollm2-135m-instruct-balanced.safetensors"
    ) as path:
        return Preset.load(path)


def _folder(folder: Path, name: str) -> Path:
    """A tiny model with a byte-level tokenizer, saved as `from_pretrained` wants it."""
    vocabulary = {symbol: at for at, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny(name, vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return _folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def encoder_decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BART."""
    return _folder(tmp_path_factory.mktemp("bart"), "bart")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sections = (f"= Section {n} =\n\n" + f"Sentence {n} of the text says {n * n}. " * 80 for n in range(24))
    path.write_text("\n\n".join(sections))
    return path
