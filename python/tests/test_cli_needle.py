"""``kvlathe needle`` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_helpers import preset_of
from kvlathe import CalibrationOptions, calibrate, corpus_from_files, load_model
from kvlathe.calibration.text.token_windows import windows
from kvlathe.cli import main
from kvlathe.lab.retrieval import CodedHolder


@pytest.fixture(scope="module")
def preset(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the tiny model, without a rate."""
    loaded = load_model(model_folder)
    text = windows(loaded.tokenizer, corpus_from_files(text_file).calibration, 96, 6)
    path = tmp_path_factory.mktemp("preset") / "tiny.safetensors"
    calibrate(loaded.model, text, options=CalibrationOptions(tail=16, block_len=8, cost_windows=0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(model_folder: Path, text_file: Path, *more: str) -> list[str]:
    small = "--lengths 320 --depths 0 1 --needles 1 --kinds number fact --tail 16".split()
    return ["needle", "--model", str(model_folder), "--text", str(text_file), *small, *more]


def tables(printed: str) -> list[list[list[str]]]:
    """Cells of the Markdown tables, without their headings' rules."""
    blocks = [block for block in printed.split("\n\n") if block.startswith("|")]
    rows = [[line for line in block.splitlines() if not line.startswith("|---")] for block in blocks]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in rows]


def test_needle_end_to_end(
    model_folder: Path, text_file: Path, preset: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(model_folder, text_file, "--preset", str(preset), "--bits", "4", "6")
    run += ["--baselines", "q8_0", "kivi-2"]
    assert main([*run, "--report", "report.html", "--plots", "plots"]) == 0
    first = capsys.readouterr()
    by_length, by_kind = tables(first.out)
    caches = ["exact", "kvlathe 4.00 bits", "kvlathe 6.00 bits", "q8_0", "kivi-2"]
    assert [row[0] for row in by_length] == [row[0] for row in by_kind] == ["cache", *caches]
    assert by_length[0][2] == "320: found" and by_kind[0][2] == "number: found"
    bits = {row[0]: row[1] for row in by_length[1:]}
    assert (bits["exact"], bits["q8_0"], bits["kivi-2"]) == ("16.00", "8.50", "3.50")
    page = (folder / "report.html").read_text()
    assert all(name in page for name in caches) and page.count("<svg") == 2
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "needle-found.svg",
        "needle-log-probability.svg",
    ]
    lines = [json.loads(line) for line in (folder / "kvlathe-needle.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * len(caches)
    for line in lines:
        assert len(line["log_probs"]) == len(line["answer"]) + 1  # a token a byte, and the space before
        assert all(log_prob <= 0 for log_prob in line["log_probs"])
        assert not line["found"]  # the model is noise

    # The same command again runs nothing and says the same; with a cell more it runs that one.
    assert main(run) == 0
    again = capsys.readouterr()
    assert tables(again.out) == [by_length, by_kind]
    assert "20 of 20 results were kept from kvlathe-needle.jsonl" in again.err
    assert main([*run, "--depths", "0", "0.5", "1"]) == 0
    assert "20 of 30 results were kept" in capsys.readouterr().err


def test_an_interruption_keeps_results(
    model_folder: Path,
    text_file: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    run = arguments(model_folder, text_file, "--baselines", "q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(CodedHolder, "hold", interrupted)
        assert main(run) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert main(run) == 0
    assert "1 of 8 results were kept" in capsys.readouterr().err


def test_calibrated_baselines_run(
    model_folder: Path, text_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(model_folder, text_file, "--baselines", "rank-int8-kv", "--calibration-windows", "1")
    assert main(run) == 0
    assert [row[0] for row in tables(capsys.readouterr().out)[0][1:]] == ["exact", "rank-int8-kv"]


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ((), 1, "kvlathe tune"),
        (("--preset", "PRESET"), 1, "--bits"),
        (("--preset", "OTHER"), 1, "calibrated"),
        (("--baselines", "kivi-3"), 1, "kivi-4"),
        (("--baselines", "q8_0", "--kinds", "rhyme"), 1, "number, fact, sentence"),
        (("--baselines", "q8_0", "--lengths", "4096"), 1, "at most 2048"),
        (("--baselines", "q8_0", "--lengths", "50"), 1, "no room for text"),
        (("--baselines", "q8_0", "--tail", "400"), 1, "nothing to be coded"),
        (("--baselines", "q8_0", "--tail", "-1"), 2, "0 or more"),
        (("--baselines", "q8_0", "--depths", "50"), 2, "shares from 0 to 1"),
        (("--baselines", "q8_0", "--output", "nowhere/results.jsonl"), 2, "no folder"),
        (("--baselines", "q8_0", "--text", "missing.txt"), 1, "missing.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    more: tuple[str, ...],
    status: int,
    says: str,
    model_folder: Path,
    text_file: Path,
    preset: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preset_of("gpt2").save(folder / "other.safetensors")
    paths = {"PRESET": str(preset), "OTHER": str(folder / "other.safetensors")}
    assert main(arguments(model_folder, text_file, *(paths.get(word, word) for word in more))) == status
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert [path.name for path in folder.iterdir()] == ["other.safetensors"]


def test_usual_lengths_stop_at_what_the_model_reads(
    model_folder: Path,
    text_file: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvlathe.cli.needle._LENGTHS", (300, 400, 4096))
    run = ["needle", "--model", str(model_folder), "--text", str(text_file), "--baselines", "q8_0"]
    assert main([*run, "--depths", "0.5", "--needles", "1", "--kinds", "number"]) == 0
    printed = capsys.readouterr()
    assert "at most 2048 tokens; 1 of the usual lengths" in printed.err
    assert tables(printed.out)[0][0][2:7:2] == ["300: found", "400: found", "all: found"]
