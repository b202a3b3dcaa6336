"""Prefixes that are stored and found again: by whom, how much of them, and what happens when a store fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_helpers import compressed_cache, identity_cache, model_of, preset_of, served, tokens
from kvlathe import (
    CacheStateError,
    CompressedDynamicCache,
    ModelError,
    PrefixStore,
    PrefixStoreError,
    PrefixStoreWarning,
    PresetError,
    ShapeError,
)
from kvlathe.model_loading import LoadedModel
from kvlathe.preset import Preset
from prefix_helpers import CHUNK, filled, store_of
from tiny_models import tiny

_GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "prefixes").as_uri()


def logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


def files(url: str) -> list[Path]:
    return sorted(Path(url.removeprefix("file://")).rglob("*.kvl"))


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2", "qwen3"])
def test_a_stored_prefix_is_as_good_as_one_in_memory(name: str, kind: str, url: str) -> None:
    """Windows, sinks, several families; prompts that go on elsewhere share what they have in common."""
    with served(model_of(name)) as model:
        store = store_of(url if kind == "folder" else "memory://", name)
        ids = tokens(150, batch=1)
        assert store.save(ids, filled(name, ids)) == 144
        other = torch.cat([ids[:, :100], tokens(30, seed=4)], dim=1)
        for prompt, n_stored in ((ids, 144), (ids[:, :144], 128), (other, 96), (ids[:, :16], 0)):
            cache, n_tokens = store.load(prompt)
            assert n_tokens == n_stored == cache.get_seq_length()
            in_memory = CompressedDynamicCache.from_preset(preset_of(name), model=model, uncompressed_tail=0)
            if n_tokens:
                logits(model, in_memory, prompt[:, :n_tokens])
            rest = prompt[:, n_tokens:]
            expected = logits(model, in_memory, rest)
            # To the bit where layers see all tokens; a window's sums begin elsewhere.
            torch.testing.assert_close(logits(model, cache, rest), expected, atol=2e-5, rtol=2e-5)
            if n_tokens and name in ("llama", "gpt2", "qwen3"):
                assert torch.equal(cache.layers[0].keys, in_memory.layers[0].keys)
            assert cache.get_memory_stats()["expanded_layers"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats(dtype: torch.dtype, url: str) -> None:
    model = tiny("llama").to(dtype)
    store = PrefixStore(
        url, preset_of("llama"), model=model, chunk_len=CHUNK, uncompressed_tail=0, strict=True
    )
    ids = tokens(60)
    out = store.generate(input_ids=ids, **_GREEDY)
    assert torch.equal(store.generate(input_ids=ids, **_GREEDY), out)
    assert store.statistics.n_tokens_found == 48


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generation_with_a_store_is_the_same(name: str, url: str) -> None:
    with served(model_of(name)) as model:
        store = store_of(url, name)
        prompt = tokens(70)
        for n_found in (0, 64):
            cache = CompressedDynamicCache.from_preset(preset_of(name), model=model, uncompressed_tail=0)
            if n_found:
                logits(model, cache, prompt[:, :n_found])
            expected = model.generate(prompt, past_key_values=cache, **_GREEDY)
            out = store.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **_GREEDY)
            assert torch.equal(out, expected)
        # A conversation goes on: of its 76 tokens 75 were held, of the next turn's 102 101.
        for _ in range(2):
            out = store.generate(input_ids=torch.cat([out, tokens(20)], dim=1), **_GREEDY)
        found = store.statistics
        assert (found.n_lookups, found.n_hits, found.n_failures) == (4, 3, 0)
        assert found.n_tokens_found == 64 + 64 + 96


def test_the_latest_tokens_are_made_anew_and_stay_exact(url: str) -> None:
    """As in a cache that was never stored: presets are measured so, and what is next to a new token costs most."""
    ids = tokens(300)
    store_of(url).save(ids, filled("llama", ids))
    for options, n_stored in (({}, 160), ({"uncompressed_tail": 20}, 272), ({"uncompressed_tail": 290}, 0)):
        store = PrefixStore(url, preset_of("llama"), model=model_of("llama"), chunk_len=CHUNK, **options)
        cache, n_tokens = store.load(ids)
        assert n_tokens == n_stored
        logits(model_of("llama"), cache, ids[:, n_tokens:])
        logits(model_of("llama"), cache, tokens(1))
        stats = cache.get_memory_stats()
        assert (
            stats["uncompressed_tokens"] >= cache.uncompressed_tail == store._of_caches["uncompressed_tail"]
        )
        assert stats["compressed_tokens"] >= n_stored - preset_of("llama").n_sinks


def test_only_what_is_missing_is_written(url: str) -> None:
    store, ids = store_of(url), tokens(100)
    store.save(ids, filled("llama", ids))
    written = {path: path.stat().st_ino for path in files(url)}
    assert len(written) == store.statistics.n_chunks_saved == 6
    longer = torch.cat([ids[:, :90], tokens(50, seed=3)], dim=1)
    assert store_of(url).save(longer, filled("llama", longer)) == 128
    now = {path: path.stat().st_ino for path in files(url)}
    assert len(now) == 6 + 3 and all(now[path] == at for path, at in written.items())
    assert store.save(longer, filled("llama", longer)) == 128
    assert store.statistics.n_chunks_saved == 6


def test_a_cache_is_left_as_it_was(url: str) -> None:
    cache, ids = compressed_cache("llama", tail=40), tokens(150)
    twin = compressed_cache("llama", tail=40)
    for each in (cache, twin):
        logits(model_of("llama"), each, ids)
    before = cache.get_memory_stats()
    assert store_of(url).save(ids, cache) == 144
    assert cache.get_memory_stats() == before and before["uncompressed_tokens"] > 40
    rest = tokens(5, seed=8)
    assert torch.equal(logits(model_of("llama"), cache, rest), logits(model_of("llama"), twin, rest))


def test_batches_have_what_all_rows_have(url: str) -> None:
    store = store_of(url)
    ids = tokens(80, batch=3)
    ids[2, :40] = ids[0, :40]
    assert store.save(ids, filled("llama", ids)) == 80
    assert len(files(url)) == 5 + 5 + 3
    prompt = torch.cat([ids, tokens(9, batch=3, seed=1)], dim=1)
    prompt[1, 50] += 1
    cache, n_tokens = store.load(prompt)
    assert n_tokens == 48
    in_memory = CompressedDynamicCache.from_preset(
        preset_of("llama"), model=model_of("llama"), uncompressed_tail=0
    )
    logits(model_of("llama"), in_memory, prompt[:, :48])
    rest = prompt[:, 48:]
    assert torch.equal(logits(model_of("llama"), cache, rest), logits(model_of("llama"), in_memory, rest))


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_several_answers(asked: dict[str, Any], url: str) -> None:
    store, prompt = store_of(url), tokens(70, batch=2)
    options = {**_GREEDY, **asked}
    if asked.get("num_beams"):
        cache = CompressedDynamicCache.from_preset(
            preset_of("llama"), model=model_of("llama"), uncompressed_tail=0
        )
        expected = model_of("llama").generate(prompt, past_key_values=cache, **options)
        for _ in range(2):
            assert torch.equal(store.generate(input_ids=prompt, **options), expected)
    else:
        for _ in range(2):
            assert store.generate(input_ids=prompt, **options).shape == (4, 76)
    assert store.statistics.n_tokens_found == 2 * 64 and len(files(url)) == 2 * 4


def test_other_weights_extras_and_tenants_never_meet(url: str) -> None:
    ids = tokens(70)
    assert store_of(url, tenant_secret="a").save(ids, filled("llama", ids), extra_key="x") == 64
    tuned = tiny("llama")
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[3, 3] += 0.01
        tuned.model.layers[0].mlp.up_proj.weight[:, ::3] += 0.01
    wide = tiny("llama").to(torch.bfloat16)
    for secret, extra, model, n_stored in [
        ("a", "x", None, 64),
        ("", "x", None, 0),
        ("b", "x", None, 0),
        ("a", "", None, 0),
        ("a", "y", None, 0),
        ("a", "x", tuned, 0),
        ("a", "x", wide, 0),
    ]:
        assert store_of(url, tenant_secret=secret).load(ids, extra_key=extra, model=model)[1] == n_stored
    finer = PrefixStore(
        url, preset_of("llama", 7.0), model=model_of("llama"), chunk_len=CHUNK, tenant_secret="a"
    )
    assert finer.load(ids, extra_key="x")[1] == 0
    longer = PrefixStore(
        url, preset_of("llama"), model=model_of("llama"), chunk_len=2 * CHUNK, tenant_secret="a"
    )
    assert longer.load(ids, extra_key="x")[1] == 0


def test_windows_that_have_dropped_the_beginning_say_what_to_do(url: str) -> None:
    ids = tokens(150)
    cache = CompressedDynamicCache.from_preset(
        preset_of("mistral"), model=model_of("mistral"), uncompressed_tail=0
    )
    logits(model_of("mistral"), cache, ids)
    with pytest.raises(PrefixStoreError, match="activate_past_recording"):
        store_of(url, "mistral").save(ids, cache)
    assert store_of(url, "mistral").load(ids)[1] == 0


@pytest.fixture
def gone() -> Iterator[str]:
    """A server that is not there."""
    yield "redis://127.0.0.1:1/0"


def test_a_store_that_is_down_is_a_miss_told_once(gone: str) -> None:
    store = store_of(gone, strict=False, timeout_s=1.0)
    prompt = tokens(40)
    cache = CompressedDynamicCache.from_preset(
        preset_of("llama"), model=model_of("llama"), uncompressed_tail=0
    )
    expected = model_of("llama").generate(prompt, past_key_values=cache, **_GREEDY)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(store.generate(input_ids=prompt, **_GREEDY), expected)
    assert time.monotonic() - began < 10
    messages = [str(each.message) for each in told if each.category is PrefixStoreWarning]
    assert 1 <= len(messages) <= 2 and all("127.0.0.1:1" in message for message in messages)
    assert store.statistics.n_failures == 4
    strict = PrefixStore(gone, preset_of("llama"), model=model_of("llama"), strict=True, timeout_s=1.0)
    with pytest.raises(PrefixStoreError):
        strict.load(tokens(400))


def test_a_damaged_chunk_is_a_miss_and_is_written_anew(url: str) -> None:
    ids = tokens(100)
    store = store_of(url, strict=False)
    store.save(ids, filled("llama", ids))
    path = next(path for path in files(url) if path.name.endswith("-48.kvl"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.warns(PrefixStoreWarning, match="damaged.*going on without it"):
        assert store.load(ids)[1] == 32
    assert not path.exists()
    assert store.save(ids, filled("llama", ids)) == 96
    assert store.load(ids)[1] == 96


def test_a_full_disk_and_a_folder_without_permission_are_told(url: str) -> None:
    folder = Path(url.removeprefix("file://"))
    folder.mkdir()
    (folder / "v1").write_text("a file where a folder should be")
    ids = tokens(100)
    store = store_of(url, strict=False)
    with pytest.warns(PrefixStoreWarning):
        assert store.save(ids, filled("llama", ids)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.load(ids)[1] == 0


def test_a_folder_stays_within_its_size(url: str) -> None:
    ids = tokens(100)
    store_of(url).save(ids, filled("llama", ids))
    one = max(path.stat().st_size for path in files(url))
    limited = store_of(url, max_bytes=4 * one)
    other = tokens(100, seed=2)
    time.sleep(0.02)
    limited.save(other, filled("llama", other))
    assert sum(path.stat().st_size for path in files(url)) <= 4 * one
    assert limited.load(other)[1] >= 48 and limited.load(ids)[1] < 96
    assert store_of(url, max_age_s=0.0).evict()[0] > 0
    assert files(url) == []


def test_threads(url: str) -> None:
    store = store_of(url)
    prompts = [torch.cat([tokens(40), tokens(40, seed=seed % 3)], dim=1) for seed in range(8)]

    def work(prompt: Tensor) -> int:
        store.save(prompt, filled("llama", prompt))
        return store.load(torch.cat([prompt, prompt], dim=1))[1]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, prompts)) == [80] * 8
    assert store.statistics.n_failures == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_a_connection_of_its_own(url: str) -> None:
    store, ids = store_of(url), tokens(100)
    store.save(ids, filled("llama", ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if store.load(ids)[1] == 96 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.load(ids)[1] == 96


def test_what_cannot_be_stored(url: str) -> None:
    store, ids = store_of(url), tokens(40)
    with pytest.raises(CacheStateError, match="holds nothing"):
        store.save(ids, compressed_cache("llama"))
    with pytest.raises(PresetError, match="calibrated preset"):
        cache = identity_cache(model_of("llama"))
        logits(model_of("llama"), cache, ids)
        store.save(ids, cache)
    with pytest.raises(PresetError, match="one preset"):
        other = CompressedDynamicCache.from_preset(
            preset_of("llama", 7.0), model=model_of("llama"), uncompressed_tail=0
        )
        logits(model_of("llama"), other, ids)
        store.save(ids, other)
    with pytest.raises(ShapeError, match="rows"):
        store.save(tokens(40, batch=2), filled("llama", ids))
    with pytest.raises(ModelError, match="transformers' own"):
        PrefixStore(url, preset_of("lfm2"), model=model_of("lfm2")).load(ids)
    padded = tokens(40, batch=2)
    mask = torch.ones_like(padded)
    mask[0, :9] = 0
    with pytest.raises(ShapeError, match="one by one"):
        store.generate(input_ids=padded, attention_mask=mask, **_GREEDY)
    cache = compressed_cache("llama")
    with torch.no_grad():
        model_of("llama")(padded, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ShapeError, match="one by one"):
        store.save(padded, cache)
    assert files(url) == []


def test_bad_arguments(url: str, tmp_path: Path) -> None:
    preset, model = preset_of("llama"), model_of("llama")
    for bad in (0, 9, -16, 8.0):
        with pytest.raises(ShapeError, match="chunk_len"):
            PrefixStore(url, preset, chunk_len=bad)  # type: ignore[arg-type]
    for bad_url, words in [
        ("prefixes", "file:///folder"),
        ("s3://", "bucket"),
        ("gopher://x/y", "gopher"),
        ((tmp_path / "file").as_uri(), "exists|directory"),
    ]:
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(PrefixStoreError, match=words):
            PrefixStore(bad_url, preset)
    with pytest.raises(PrefixStoreError, match="timeout_s"):
        PrefixStore(url, preset, timeout_s=-1.0)
    with pytest.raises(ModelError, match="model="):
        PrefixStore(url, preset).load(tokens(9))
    with pytest.raises(PresetError):
        PrefixStore(url, preset, model=model_of("qwen3")).load(tokens(9))
    store = PrefixStore(url, preset, model=model)
    for ids in (torch.zeros(3), torch.zeros(2, 2, 2, dtype=torch.int64), [], [-1], [2**32]):
        with pytest.raises(ShapeError, match="token_ids"):
            store.load(ids)
    with pytest.raises(ShapeError, match="extra_key"):
        store.generate(input_ids=tokens(9), pixel_values=torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match="input_ids"):
        store.generate(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ModelError, match="encoder"):
        store.generate(model_of("bart"), input_ids=tokens(9))


_SMOLLM2 = """
import sys
from kvlathe import PrefixStore, load_model
from kvlathe.presets import smollm2

loaded = load_model("smollm2")
store = PrefixStore(sys.argv[1], smollm2(), model=loaded.model, strict=True)
text = " ".join(f"Item {i} of the list is number {i * i}." for i in range(90))
inputs = loaded.tokenizer(text, return_tensors="pt")
out = store.generate(**inputs, max_new_tokens=8, do_sample=False)
print(store.statistics.n_tokens_found, out[0, -8:].tolist())
"""


def test_a_real_model_in_other_processes(smollm2: LoadedModel, bundled_preset: Preset, url: str) -> None:
    def run() -> tuple[int, str]:
        command = [sys.executable, "-W", "ignore", "-c", _SMOLLM2, url]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        n_tokens, answer = ended.stdout.split(maxsplit=1)
        return int(n_tokens), answer

    first, (n_found, answer) = run(), run()
    assert first == (0, answer) and n_found >= 512
