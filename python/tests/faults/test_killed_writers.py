"""Writers of a store, killed at any moment: nothing is lost that was reported saved, and nothing half is read."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from cache_helpers import tokens
from kvlathe import CompressedDynamicCache
from prefix_helpers import filled, store_of

N_SEQUENCES = 24

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def sequence(seed: int) -> torch.Tensor:
    return tokens(70, seed=1000 + seed)


def test_killed_at_random_points(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    caches = [filled("llama", sequence(seed)) for seed in range(N_SEQUENCES)]
    rng, reported = random.Random(0), set()
    for kill in range(40):
        receive, send = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            writer = os.fork()
        if writer == 0:
            store = store_of(url)
            for seed in random.Random(kill).sample(range(N_SEQUENCES), N_SEQUENCES):
                store.save(sequence(seed), caches[seed])
                os.write(send, bytes([seed]))
            os._exit(0)
        os.close(send)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        reported.update(os.read(receive, 1 << 10))
        os.close(receive)
        if kill % 8 == 7:
            _check(url, reported, caches)
    assert len(reported) > 3


def _check(url: str, reported: set[int], caches: list[CompressedDynamicCache]) -> None:
    store = store_of(url)  # strict: something half would be an error
    for seed, cache in enumerate(caches):
        found, n_tokens = store.load(sequence(seed))
        assert n_tokens == 64 or seed not in reported
        for layer, expected in zip(found.layers, cache.layers, strict=True):
            if n_tokens:
                assert torch.equal(layer.keys, expected.keys[:, :, :n_tokens])
