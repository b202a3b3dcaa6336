"""Which weights a server's model has, by its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvlathe import ModelError
from kvlathe.plugins.weights import weights_identity


def folder(path: Path, weights: bytes = b"w" * 100_000, config: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text(str(path))
    return path


def test_copies_are_one_model_and_changes_make_another(tmp_path: Path) -> None:
    first = weights_identity(str(folder(tmp_path / "a")))
    assert first == weights_identity(str(folder(tmp_path / "b")))
    others = [
        folder(tmp_path / "tuned", b"v" * 100_000),
        folder(tmp_path / "end", b"w" * 99_999 + b"x"),
        folder(tmp_path / "longer", b"w" * 100_001),
        folder(tmp_path / "rope", config='{"rope_theta": 5}'),
    ]
    os.rename(folder(tmp_path / "renamed") / "model.safetensors", tmp_path / "renamed" / "other.safetensors")
    identities = [weights_identity(str(path)) for path in [*others, tmp_path / "renamed"]]
    assert len({first, *identities}) == 6
    file = tmp_path / "a" / "model.safetensors"
    assert weights_identity(str(file)) == weights_identity(str(file)) != first


@pytest.mark.parametrize("name", ["no/such-model", "{empty}"])
def test_unknown_weights_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match='"weights"'):
        weights_identity(name.format(empty=tmp_path))
