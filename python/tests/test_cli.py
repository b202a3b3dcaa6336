"""The command line, on a tiny model in a folder: `kvlathe tune`, `kvlathe show`, the seed's script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from kvlathe import CompressedDynamicCache, Preset, load_model
from kvlathe.cli import main
from kvlathe.legacy.auto_tune import tune_main
from kvlathe.presets import smollm2

SCRIPT = Path(__file__).parents[2] / "scripts" / "auto_tune_kv_compression.py"


def arguments(model_folder: Path, text_file: Path, output: Path, *more: str) -> list[str]:
    windows = "--window 96 --calibration-windows 8 --evaluation-windows 4 --verification-windows 4"
    small = f"{windows} --keep-recent 16 --block-len 8".split()
    return ["--model", str(model_folder), "--text", str(text_file), "--output", str(output), *small, *more]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_tune_writes_a_preset_within_budget(
    suffix: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"preset{suffix}"
    assert main(["tune", *arguments(model_folder, text_file, output, "--target-ppl-delta", "0.05")]) == 0
    printed = capsys.readouterr()
    assert "<- chosen" in printed.out and "perplexity" in printed.out
    measured = Preset.load(output).meta["kvlathe"]["measured"]
    assert measured["ppl_delta_bound"] <= 0.05
    assert measured["curve"] == sorted(measured["curve"], key=lambda point: point["bits_per_value"])
    if suffix == ".json":
        seed_keys = {"model", "rank", "head_dim", "n_layers", "n_heads", "compression_ratio", "layers"}
        assert seed_keys <= json.loads(output.read_text()).keys()

    assert main(["show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "bits a value" in shown and "top-1 agreement" in shown


def test_an_encoder_decoder_is_tuned_verified_and_generates_from_blocks(
    encoder_decoder_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "preset.safetensors"
    given = arguments(encoder_decoder_folder, text_file, output, "--target-ppl-delta", "0.05")
    assert main(["tune", *given]) == 0
    own = ["--model", str(encoder_decoder_folder), "--text", str(text_file)]
    assert main(["verify", str(output), *own]) == 0
    assert "The promise holds" in capsys.readouterr().out

    model = load_model(encoder_decoder_folder).model
    cache = CompressedDynamicCache.from_preset(Preset.load(output), model=model, uncompressed_tail=0)
    encoded, ids = torch.arange(3, 33)[None], torch.arange(3, 63)[None]
    both = EncoderDecoderCache(cache, DynamicCache())
    model.generate(encoded, decoder_input_ids=ids, past_key_values=both, max_new_tokens=12, min_new_tokens=12)
    stats = cache.get_memory_stats()
    assert stats["compressed_tokens"] > 0 and stats["expanded_layers"] == 0


def test_an_impossible_budget_writes_nothing(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "preset.json"
    assert main(["tune", *arguments(model_folder, text_file, output, "--target-kld", "1e-30")]) == 1
    assert "cannot be met" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        (("--output", "preset.pickle"), 2, ".safetensors or .json"),
        (("--output", "nowhere/preset.json"), 2, "no folder"),
        (("--model", "no/such/folder/anywhere"), 1, "no such model folder"),
        (("--text", "missing.txt"), 1, "missing.txt"),
        (("--window", "16"), 1, "tail"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: tuple[str, str],
    status: int,
    says: str,
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *arguments(model_folder, text_file, Path("preset.json"), *changes)]) == status
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda_names_the_cpu(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert tune_main(arguments(model_folder, text_file, tmp_path / "p.json", "--device", "cuda")) == 1
    assert 'device="cpu"' in capsys.readouterr().err


def test_show_refuses_what_is_no_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "preset.json"
    path.write_text('{"model": "x"')
    assert main(["show", str(path)]) == 1
    assert "error:" in capsys.readouterr().err


def test_the_seed_script_runs() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--target-ppl-delta" in done.stdout and "--output" in done.stdout


def test_showing_a_preset_needs_no_torch(tmp_path: Path) -> None:
    preset = tmp_path / "seed.json"
    layer = {"V": {"U": [[1.0], [0.0]], "mean": [0.0, 0.0]}}
    meta = {"model": "m", "rank": 1, "head_dim": 2, "n_layers": 1, "n_heads": 1, "compression_ratio": 4.0}
    preset.write_text(json.dumps({**meta, "layers": [layer]}))
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"from kvlathe.cli import main; sys.exit(main(['show', {str(preset)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "seed-style" in done.stdout


def test_verify_says_whether_the_promise_holds(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "preset.safetensors"
    assert main(["tune", *arguments(model_folder, text_file, output, "--target-ppl-delta", "0.05")]) == 0
    own = [
        str(output),
        "--model",
        str(model_folder),
        "--text",
        str(text_file),
        "--window",
        "96",
        "--windows",
        "4",
    ]
    capsys.readouterr()
    assert main(["verify", *own]) == 0
    printed = capsys.readouterr().out
    assert "The promise holds." in printed and "+5 %" in printed
    assert main(["verify", *own, "--target-kld", "1e-12"]) == 1
    assert "does NOT hold" in capsys.readouterr().out
    other_rate = tmp_path / "other.safetensors"
    Preset.load(output).with_bits(3.0).save(other_rate)
    assert main(["verify", str(other_rate), *own[1:]]) == 1
    assert "promises nothing" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "kvlathe.cli", "show", str(smollm2())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == b""
    assert process.returncode == 141


def test_without_arguments_all_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(
        f"\n    {command} " in said for command in ("tune", "verify", "show", "prefix", "eval", "needle")
    )
