"""scripts/soak.py for some conversations, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cache_helpers import preset_of

SCRIPT = Path(__file__).parents[3] / "scripts" / "soak.py"


def test_a_short_soak(tmp_path: Path, model_folder: Path) -> None:
    preset, output = tmp_path / "preset.safetensors", tmp_path / "soak.json"
    # The vocabulary of the model in the folder.
    preset_of("llama", 4.0, vocab_size=256).save(preset)
    options = "--conversations 8 --threads 1 --replayed 1 --context 200 --tail 16 --growth 64".split()
    command = [sys.executable, SCRIPT, "--model", model_folder, "--preset", preset, "--output", output]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " left: " in done.stderr and "0 with other tokens, logits differ by 0 at most" in done.stdout
    found = json.loads(output.read_text())
    assert {"read", "decode", "crop", "reset"} <= found["operations"].keys()
    assert found["comparisons"] == 8
    assert found["largest difference of logits"] == 0
    assert len(found["resident_mb"]["over_time"]) == 8
