"""Corpora: the split, the sources and the packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvlathe.calibration.text.corpus import Corpus, Document, corpus_from_files, default_corpus, halves
from kvlathe.calibration.text.token_windows import windows
from kvlathe.errors import CorpusError


class CharTokenizer:
    """One token per character, with or without BOS (1)."""

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos
        self.bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        bos = [1] if self.adds_bos and add_special_tokens else []
        return {"input_ids": bos + [ord(c) for c in text]}


@pytest.fixture(scope="module")
def cpython() -> Corpus:
    return default_corpus()


def test_default_corpus_is_half_prose_half_source(cpython: Corpus) -> None:
    for side in (cpython.calibration, cpython.held_out):
        prose = sum(len(d.text) for d in side if d.kind == "prose")
        source = sum(len(d.text) for d in side if d.kind == "source")
        assert prose > 200_000 and source > 200_000
    both = cpython.calibration + cpython.held_out
    share = sum(len(d.text) for d in both if d.kind == "prose") / sum(len(d.text) for d in both)
    assert 0.4 < share < 0.6
    files = {d.name.split("/", 1)[1] for d in both if d.kind == "source"}
    assert not files & {d.name.split("/", 1)[1] for d in both if d.name.startswith("docstrings/")}
    assert not any(part in name.split("/") for name in files for part in ("test", "idlelib", "encodings"))


def test_default_corpus_is_deterministic_and_follows_the_seed() -> None:
    small = default_corpus(characters=100_000)
    assert small == default_corpus(characters=100_000)
    assert small.calibration != default_corpus(characters=100_000, seed=1).calibration


def test_split_is_by_document_and_stable() -> None:
    documents = [Document(f"d{i}", f"text {i}") for i in range(100)]
    corpus = Corpus.from_documents("x", documents, calibration_fraction=0.3)
    names = [{d.name for d in side} for side in (corpus.calibration, corpus.held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 100
    assert 15 <= len(names[0]) <= 45
    # Documents that go do not move the others.
    fewer = Corpus.from_documents("x", documents[:80], calibration_fraction=0.3)
    assert {d.name for d in fewer.calibration} == names[0] - {d.name for d in documents[80:]}
    assert Corpus.from_documents("x", documents, seed=1).calibration != corpus.calibration


def test_equal_texts_never_face_each_other() -> None:
    documents = [Document(f"d{i}", f"text {i % 10}") for i in range(100)]
    corpus = Corpus.from_documents("x", documents)
    assert len(corpus.calibration) + len(corpus.held_out) == 10
    with pytest.raises(CorpusError, match="both sides"):
        Corpus("x", (Document("a", "same"),), (Document("b", "same"),))
    with pytest.raises(CorpusError, match="at least 2"):
        Corpus.from_documents("x", [Document("a", "same"), Document("b", "same")])


def test_a_side_is_never_empty() -> None:
    corpus = Corpus.from_documents("x", [Document("a", "1"), Document("b", "2")], calibration_fraction=0.001)
    assert len(corpus.calibration) == len(corpus.held_out) == 1


@pytest.mark.parametrize("heading", [" = {} = \n", "# {}\n", "\n\n"])
def test_a_single_file_is_split_in_contiguous_parts(tmp_path: Path, heading: str) -> None:
    chapters = [heading.format(f"Title {i}") + f"Line of chapter {i}.\n" * 120 for i in range(12)]
    path = tmp_path / "book.txt"
    path.write_text("".join(chapters))
    corpus = corpus_from_files(path)
    calibration = "".join(d.text for d in corpus.calibration)
    held_out = "".join(d.text for d in corpus.held_out)
    assert calibration + held_out == path.read_text()
    assert all(len(d.text) >= 2000 for d in corpus.calibration + corpus.held_out)
    assert 0.25 < len(calibration) / len(calibration + held_out) < 0.42
    assert len(corpus_from_files(path, calibration_fraction=0.7).calibration) > len(corpus.calibration)
    # The rest is halved the same way: neighbouring sections stay on one side.
    search, verification = halves(corpus.held_out)
    assert search + verification == corpus.held_out
    assert abs(sum(len(d.text) for d in search) - len(held_out) / 2) < 4000


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for i in range(6):
        (tmp_path / "sub" / f"{i}.md").write_text(f"document {i}")
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    corpus = corpus_from_files([tmp_path])
    assert sorted(d.name for d in corpus.calibration + corpus.held_out) == [f"sub/{i}.md" for i in range(6)]
    with pytest.raises(CorpusError, match="no such file"):
        corpus_from_files(tmp_path / "missing")
    with pytest.raises(CorpusError, match="no readable"):
        corpus_from_files(tmp_path / "image.png")
    with pytest.raises(CorpusError, match="characters"):
        corpus_from_files(tmp_path / "sub" / "0.md")
    with pytest.raises(CorpusError, match="between 0 and 1"):
        corpus_from_files(tmp_path, calibration_fraction=1.0)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_windows_are_full_and_deterministic(adds_bos: bool, seed: int | None) -> None:
    documents = [Document(f"d{i}", chr(97 + i) * (30 * i + 7)) for i in range(10)]
    got = windows(CharTokenizer(adds_bos), documents, window=50, n_windows=9, seed=seed)
    again = windows(CharTokenizer(adds_bos), documents, window=50, n_windows=9, seed=seed)
    assert len(got) == 9 and all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for window in got:
        assert window.shape == (50,) and window.dtype == torch.long
        assert (window[0] == 1) == adds_bos and not (window[1:] == 1).any()


def test_one_long_document_does_not_fill_the_sample() -> None:
    documents = [Document("long", "x" * 10_000), *(Document(f"d{i}", chr(97 + i) * 60) for i in range(8))]
    got = windows(CharTokenizer(False), documents, window=50, n_windows=9, seed=0)
    assert sum((w == ord("x")).all().item() for w in got) <= 2


def test_running_text_keeps_its_order() -> None:
    documents = [Document("b", "abcdef\n"), Document("a", "ghij"), Document("c", "klmnop")]
    got = windows(CharTokenizer(False), documents, window=6, n_windows=3, seed=None)
    assert "".join(chr(int(t)) for w in got for t in w) == "abcdef\nghij\n\nklmno"


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(CorpusError, match=r"100 tokens.*2 full windows.*7 windows need 350 tokens"):
        windows(CharTokenizer(False), [Document("d", "x" * 100)], window=50, n_windows=7)
    with pytest.raises(CorpusError, match="at least"):
        windows(CharTokenizer(False), [Document("d", "x" * 100)], window=1)
