"""vLLM with compressed chunks behind its cache: processes come and go, and prompts are not read twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlathe import load_model
from kvlathe.presets import smollm2
from services.servers import Server

VENV = os.environ.get("KVLATHE_VLLM")
PACKAGE = Path(__file__).parents[2]
PROMPT_TOKENS = 1000
# 7 chunks of 128 tokens; one holds some of the last 128 tokens, which the model makes anew.
STORED, LOADED = 7 * 128, 6 * 128

pytestmark = [
    pytest.mark.slow_model,
    pytest.mark.skipif(VENV is None, reason="needs vLLM: make test-services"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in bfloat16, as vLLM takes models."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    loaded = load_model("smollm2")
    loaded.model.to(torch.bfloat16).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A text that says things once."""
    text = " ".join(
        f"Shelf {i} holds {7 * i % 100} books on {['law', 'art', 'music'][i % 3]}." for i in range(400)
    )
    ids: list[int] = load_model("smollm2").tokenizer(text).input_ids[:PROMPT_TOKENS]
    return ids


def tier(url: str, **options: Any) -> dict[str, Any]:
    preset = str(smollm2("tight"))
    return {
        "type": "CompressedTier",
        "module_path": "kvlathe.plugins.vllm",
        "url": url,
        "preset": preset,
        **options,
    }


def started(**told: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [f"{VENV}/bin/python", str(Path(__file__).with_name("vllm_process.py"))],
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "VIRTUAL_ENV": str(VENV)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    told = {key: str(value) if isinstance(value, Path) else value for key, value in told.items()}
    process.stdin.write(json.dumps(told))
    process.stdin.close()
    process.stdin = None
    return process


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The answers, and what was logged."""
    out, errors = process.communicate(timeout=300)
    lines = [line for line in out.splitlines() if line.startswith("answers ")]
    assert lines, out[-3000:] + errors[-3000:]
    answers: dict[str, Any] = json.loads(lines[-1].removeprefix("answers "))
    assert not list(Path("/dev/shm").glob(f"vllm_offload*{process.pid}*"))
    return {**answers, "log": [line for line in errors.splitlines() if line.startswith("kvlathe: ")]}


def ask(**told: Any) -> dict[str, Any]:
    return said(started(**told))


def kld(exact: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the first token's distribution, in nats."""
    p, q = exact["first_logprobs"], other["first_logprobs"]
    return sum(math.exp(log_p) * (log_p - q[token]) for token, log_p in p.items())


def test_later_processes_load_what_one_has_read(tmp_path: Path, model: Path, prompt: list[int]) -> None:
    ours, exact = tmp_path / "ours", tmp_path / "exact"
    longer = [*prompt, *prompt[:100]]
    for folder, options in ((ours, tier(ours.as_uri())), (exact, {"type": "fs", "root_dir": str(exact)})):
        folder.mkdir()
        first = ask(model=model, prompts=[prompt], tier=options)
        assert first["answers"][0]["n_cached"] == 0 and not first["log"]
    # Two at the same time, with a prompt that goes on.
    told = {"model": model, "prompts": [longer], "n_logprobs": -1}
    both = [started(tier=tier(ours.as_uri()), **told) for _ in range(2)]
    answers = [said(process) for process in both]
    recomputed = ask(**told)["answers"][0]
    for one in answers:
        assert not one["log"]
        # What ends before the last 128 tokens of 1,100.
        assert one["answers"][0]["n_cached"] == STORED
        assert one["counters"]["vllm:external_prefix_cache_hits"] == STORED
        assert one["counters"]["vllm:kv_offload_tiering_chunk_hits1:CompressedTier"] == STORED / 128
        assert one["answers"][0]["token_ids"] == answers[0]["answers"][0]["token_ids"]
        assert kld(recomputed, one["answers"][0]) < 0.03

    def chunk_bytes(folder: Path, kind: str) -> float:
        return statistics.mean(file.stat().st_size for file in folder.rglob(kind))

    # 2.5 bits of 16, the first chunk's exact tokens, a table of blocks.
    assert chunk_bytes(ours, "*.kvl") * 5.5 < chunk_bytes(exact, "*.bin")


def test_other_weights_of_one_name_load_nothing(tmp_path: Path, model: Path, prompt: list[int]) -> None:
    store = tmp_path / "store"
    store.mkdir()
    tuned = tmp_path / "smollm2"
    shutil.copytree(model, tuned)
    assert ask(model=tuned, prompts=[prompt], tier=tier(store.as_uri()))["answers"][0]["n_cached"] == 0
    again = ask(model=model, prompts=[prompt], tier=tier(store.as_uri()))["answers"][0]
    assert again["n_cached"] == LOADED, "a copy is the same model"
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    half = len(weights) // 2
    weights[half:] = bytes(byte ^ 1 if at % 2 == 0 else byte for at, byte in enumerate(weights[half:]))
    (tuned / "model.safetensors").write_bytes(weights)
    other = ask(model=tuned, prompts=[prompt], tier=tier(store.as_uri()))
    assert other["answers"][0]["n_cached"] == 0 and not other["log"]


def test_a_damaged_chunk_is_computed_and_stored_anew(tmp_path: Path, model: Path, prompt: list[int]) -> None:
    options = tier(tmp_path.as_uri())
    exact = ask(model=model, prompts=[prompt], tier=options)["answers"][0]
    fifth = next(tmp_path.rglob(f"*-{5 * 128}.kvl"))
    whole = fifth.read_bytes()
    fifth.unlink()
    fifth.write_bytes(whole[:-200] + bytes(200))
    found = ask(model=model, prompts=[prompt], tier=options)
    assert found["answers"][0]["n_cached"] == 4 * 128
    assert any("damaged" in line for line in found["log"])
    assert found["answers"][0]["token_ids"] == exact["token_ids"]
    assert next(tmp_path.rglob(f"*-{5 * 128}.kvl")).stat().st_size == len(whole)


def test_redis_and_what_happens_without_it(
    redis: Server, tmp_path: Path, model: Path, prompt: list[int]
) -> None:
    options = tier(f"redis://127.0.0.1:{redis.port}/1", max_age_s=3600, tenant_secret="x")
    ask(model=model, prompts=[prompt], tier=options)
    found = ask(model=model, prompts=[prompt], tier=options)["answers"][0]
    assert found["n_cached"] == LOADED
    # It stops while a process that found it when it started is still loading its model.
    gone = tmp_path / "gone"
    waiting = started(model=model, prompts=[prompt], tier={**options, "timeout_s": 2.0}, wait_for=gone)
    assert waiting.stdout is not None
    while "ready" not in waiting.stdout.readline():
        assert waiting.poll() is None
    redis.stop()
    gone.touch()
    alone = said(waiting)
    assert alone["answers"][0]["n_cached"] == 0
    assert len(alone["answers"][0]["token_ids"]) == 16
    assert sum("goes on without it" in line for line in alone["log"]) in (1, 2)


def test_what_cannot_work_is_said_at_the_start(model: Path) -> None:
    process = started(model=model, prompts=[[1, 2, 3]], tier=tier("file:///proc/no/such"))
    out, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "/proc/no/such" in out + errors
