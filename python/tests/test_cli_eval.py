"""``kvlathe eval`` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cache_helpers import preset_of
from kvlathe import CalibrationOptions, calibrate, corpus_from_files, load_model
from kvlathe.calibration.quality import Evaluator, Quality
from kvlathe.calibration.text.token_windows import windows
from kvlathe.cli import main
from releases import LACKS_FP8


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
    small = "--window 96 --windows 3 --tail 16 --calibration-windows 2".split()
    return ["eval", "--model", str(model_folder), "--text", str(text_file), *small, *more]


def rows(printed: str) -> list[list[str]]:
    """Cells of the Markdown table, without its two lines of heading."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


BASELINES = (
    "--baselines",
    "q8_0",
    "kivi-4",
    "kvquant-3",
    "rank-int8-kv",
    *(() if LACKS_FP8 else ("hf-fp8",)),
)


def test_eval_end_to_end(
    model_folder: Path, text_file: Path, preset: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(model_folder, text_file, "--preset", str(preset), "--bits", "4", "6", *BASELINES)
    run += ["--report", "report.html", "--plots", "plots"]
    assert main(run) == 0
    first = capsys.readouterr()
    table = rows(first.out)
    assert [row[0] for row in table] == [
        "kvlathe 4.00 bits",
        "kvlathe 6.00 bits",
        *BASELINES[1:],
    ]
    page = (folder / "report.html").read_text()
    assert all(row[0] in page for row in table)
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "bits-by-layer.svg",
        "kld-against-bits.svg",
        "kld-by-position.svg",
    ]
    lines = [json.loads(line) for line in (folder / "kvlathe-eval.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [row[0] for row in table]
    for line in lines:
        quality = line["quality"]
        assert 0 < quality["kld_median"] <= quality["kld_p99"] <= quality["kld_max"]
        assert math.isclose(sum(quality["kld_by_window"]) / 3, quality["kld"], rel_tol=1e-6)
        assert quality["n_positions"] == 3 * 96

    # The same command again measures nothing and says the same.
    assert main(run) == 0
    again = capsys.readouterr()
    assert rows(again.out) == table
    assert again.err.count("kept from kvlathe-eval.jsonl") == len(table)


def test_an_interruption_keeps_results(
    model_folder: Path,
    text_file: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, names = Evaluator.run, []

    def interrupted(self: Evaluator, *coders: Any, what: str = "") -> Quality:
        names.append(what)
        if len(names) == 2:
            raise KeyboardInterrupt
        return real(self, *coders, what=what)

    run = arguments(model_folder, text_file, "--baselines", "q8_0", "q4_0", "--mode", "all-coded")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", interrupted)
        assert main(run) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert main(run) == 0
    done = capsys.readouterr()
    assert [row[0] for row in rows(done.out)] == ["q8_0", "q4_0"]
    assert done.err.count("kept from") == 1
    # All coded: 8.5 bits are 8.5 bits.
    assert [row[1] for row in rows(done.out)] == ["8.50", "4.50"]


def test_what_cannot_run_is_said_and_left_out(
    model_folder: Path,
    text_file: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    run = arguments(model_folder, text_file, "--baselines", "q8_0", "hf-hqq-4", "--report", "report.html")
    assert main(run) == 0
    printed = capsys.readouterr()
    assert [row[0] for row in rows(printed.out)] == ["q8_0"]
    assert "hf-hqq-4 does not run here" in printed.err
    assert "kvlathe tune" in printed.err  # and how to come by a preset
    assert "hf-hqq-4 does not run here" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ((), 1, "kvlathe tune"),
        (("--preset", "PRESET"), 1, "--bits"),
        (("--preset", "missing.safetensors", "--bits", "3"), 1, "missing.safetensors"),
        (("--preset", "OTHER"), 1, "calibrated"),
        (("--baselines", "kivi-3"), 1, "kivi-4"),
        (("--baselines", "q8_0", "--tail", "95"), 1, "nothing to be coded"),
        (("--baselines", "q8_0", "--tail", "-1"), 2, "0 or more"),
        (("--baselines", "q8_0", "--window", "4096"), 1, "at most 2048"),
        (("--baselines", "q8_0", "--windows", "5000"), 1, "too little text"),
        (("--baselines", "q8_0", "--output", "nowhere/results.jsonl"), 2, "no folder"),
        (("--baselines", "q8_0", "--report", "nowhere/report.html"), 2, "no folder"),
        (("--baselines", "q8_0", "--device", "tpu9"), 1, 'device="cpu"'),
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
