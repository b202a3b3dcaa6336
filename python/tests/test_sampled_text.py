"""Text that a model writes itself: as many windows as asked for, its own words, the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from cache_helpers import model_of
from kvlathe import CalibrationOptions, CorpusError, TuneOptions
from kvlathe.calibration.text.corpus import Corpus, Document
from kvlathe.calibration.text.sampled_text import sampled_windows
from kvlathe.calibration.tuning import calibrate_on
from tiny_models import VOCAB


class Numbers:
    """A tokenizer of a tiny model: 0 is BOS, which every text begins with, and 1 ends one."""

    bos_token_id = 0
    all_special_ids = (0, 1)

    def __len__(self) -> int:
        return VOCAB

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [2 + byte % (VOCAB - 2) for byte in text.encode()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def test_windows_are_full_and_begin_as_texts_do() -> None:
    found = sampled_windows(model_of("llama"), Numbers(), 40, 18)
    assert [len(window) for window in found] == [40] * 18
    assert all(window[0] == 0 and window[1] >= 2 for window in found)
    assert len({int(window[1]) for window in found}) > 5


def test_the_models_own_settings_do_not_count() -> None:
    """With every token an end of text, and penalties, a window is as it is without."""
    model = model_of("llama")
    expected = sampled_windows(model, Numbers(), 40, 3)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=list(range(VOCAB)), temperature=0.1, repetition_penalty=2.0, max_new_tokens=2
    )
    try:
        found = sampled_windows(model, Numbers(), 40, 3)
        assert model.generation_config.max_new_tokens == 2  # as before
    finally:
        model.generation_config = own
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_text_is_what_the_model_finds_likely() -> None:
    """Tokens of its own weigh more in its eyes than drawn ones."""
    model: Any = model_of("llama")
    # A tiny untrained model finds all tokens alike: sharpened, it has opinions.
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        before = head.clone()
        head.mul_(40.0)
        try:
            own = torch.stack(sampled_windows(model, Numbers(), 40, 8))
            drawn = torch.randint(2, VOCAB, own.shape, generator=torch.Generator().manual_seed(0))
            losses = [float(model(input_ids=ids, labels=ids).loss) for ids in (own, drawn)]
        finally:
            head.copy_(before)
    assert losses[0] < 0.7 * losses[1]


def test_the_seed_decides_and_nothing_else_notices() -> None:
    model = model_of("llama")
    state = torch.random.get_rng_state()
    first, again, other = (sampled_windows(model, Numbers(), 30, 2, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_window_too_short_is_refused() -> None:
    with pytest.raises(CorpusError, match="3 or more"):
        sampled_windows(model_of("llama"), Numbers(), 2, 1)


@pytest.mark.parametrize(
    ("n_sampled", "said"), [(0, "words"), (3, "words and the model's own"), (6, "the model's own")]
)
def test_a_calibration_says_what_it_read(n_sampled: int, said: str) -> None:
    documents = [Document(f"document {i}", f"seven mice ran from house {i} " * 12) for i in range(12)]
    options = TuneOptions(
        window=64,
        calibration_windows=6,
        sampled_windows=n_sampled,
        calibration=CalibrationOptions(tail=8, block_len=8),
    )
    corpus = Corpus.from_documents("words", documents)
    preset = calibrate_on(model_of("llama"), Numbers(), corpus, options)
    calibration = preset.meta["kvlathe"]["calibration"]
    assert calibration["text"] == said
    assert calibration["n_tokens"] == 6 * 64
    # Costs are never measured on the model's own text.
    assert ("cost_factors" in calibration) == (n_sampled < 6)


@pytest.mark.parametrize("n_sampled", [-1, 7])
def test_a_share_that_is_none(n_sampled: int) -> None:
    with pytest.raises(CorpusError, match="0 to 6"):
        TuneOptions(calibration_windows=6, sampled_windows=n_sampled)
