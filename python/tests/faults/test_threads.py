"""Threads and processes: caches of their own never disturb one another, and one cache for two is found out."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from cache_helpers import compressed_cache, identity_cache, model_of, preset_of, random_kv, tokens
from kvlathe import CacheStateError, CompressedDynamicCache, KvlatheError
from kvlathe.stores.native import NativeStore
from tiny_models import tiny

_GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
_MAKE: dict[str, Callable[[], CompressedDynamicCache]] = {
    "compressed": lambda: compressed_cache("llama"),
    "exact": lambda: identity_cache(model_of("llama")),
    "window": lambda: compressed_cache("gemma3"),
}


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", _MAKE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_caches_of_their_own(kind: str, attention: str, quick_switches: None) -> None:
    """Different prompts, beams among them, on one model: what each thread would have written alone."""
    model = tiny("gemma3" if kind == "window" else "llama", attn_implementation=attention)

    def generate(seed: int) -> Tensor:
        ids = tokens(50 + 3 * seed, seed)
        beams = {"num_beams": 2} if seed % 2 else {}
        return model.generate(ids, past_key_values=_MAKE[kind](), max_new_tokens=16, **_GREEDY, **beams)

    alone = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _lengths(cache: CompressedDynamicCache) -> set[int]:
    return {layer.get_seq_length() for layer in cache.layers}


class _Pause(LogitsProcessor):
    """Does something behind a pass of `generate`, before the next one: the ``at``-th, from 0."""

    def __init__(self, do: Callable[[], object], at: int = 0) -> None:
        self.do, self.at, self.n_passes = do, at, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.n_passes == self.at:
            self.do()
        self.n_passes += 1
        return scores


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", _MAKE)
def test_two_threads_generating_with_one_cache(
    kind: str, attention: str, quick_switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finishes has what it would have had alone, or an error is raised; and `reset` makes all good.

    That is of calls that overlap, so neither goes on behind its first pass before the other has tried one, too.
    """
    monkeypatch.setattr("kvlathe.cache.passes._PATIENCE_SECONDS", 0.05)
    model = tiny("gemma3" if kind == "window" else "llama", attn_implementation=attention)
    ids = tokens(40)
    expected = model.generate(ids, past_key_values=_MAKE[kind](), max_new_tokens=12, **_GREEDY)
    cache = _MAKE[kind]()
    n_refused = 0
    for _ in range(8):
        barrier, tried = threading.Barrier(2), [threading.Event() for _ in range(2)]

        def generate(
            thread: int, barrier: threading.Barrier = barrier, tried: list[threading.Event] = tried
        ) -> Tensor:
            def meet() -> None:
                tried[thread].set()
                assert tried[1 - thread].wait(600)

            barrier.wait()
            try:
                return model.generate(
                    ids, past_key_values=cache, max_new_tokens=12, logits_processor=[_Pause(meet)], **_GREEDY
                )
            finally:
                tried[thread].set()

        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(generate, thread) for thread in range(2)]
        errors = [future.exception() for future in done]
        for future, error in zip(done, errors, strict=True):
            if error is None:
                assert torch.equal(future.result(), expected)
            # Beside ours, transformers itself finds that a mask does not fit the tokens that have appeared.
            assert isinstance(error, (type(None), CacheStateError, RuntimeError, ValueError, IndexError)), (
                error
            )
        assert any(errors)
        n_refused += any(isinstance(error, CacheStateError) for error in errors)
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=12, **_GREEDY), expected)
        cache.reset()
    assert n_refused


@pytest.mark.parametrize("kind", _MAKE)
def test_calls_that_follow_each_other_are_one_sequence(kind: str) -> None:
    """Whichever threads they are in, and whatever the second has seen there before the first began."""
    model = model_of("gemma3" if kind == "window" else "llama")

    def generate(cache: CompressedDynamicCache, seed: int) -> Tensor:
        return model.generate(tokens(40, seed), past_key_values=cache, max_new_tokens=12, **_GREEDY)

    cache, shared = _MAKE[kind](), _MAKE[kind]()
    expected = [generate(cache, seed) for seed in range(2)]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        assert second.submit(shared.get_seq_length).result() == 0
        got = [thread.submit(generate, shared, seed).result() for seed, thread in enumerate((first, second))]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        # And back: a pool's threads live on, and nobody says that their calls are over.
        ids = torch.cat([expected[1], tokens(9, 2)], dim=1)
        again = first.submit(lambda: model(input_ids=ids[:, -10:], past_key_values=shared).logits).result()
    assert torch.equal(again, model(input_ids=ids[:, -10:], past_key_values=cache).logits)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("kind", _MAKE)
def test_a_call_between_two_passes_of_anothers(kind: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are alike then, and the other thread is still told."""
    monkeypatch.setattr("kvlathe.cache.passes._PATIENCE_SECONDS", 0.05)
    model, cache = model_of("gemma3" if kind == "window" else "llama"), _MAKE[kind]()
    asked = {"max_new_tokens": 12, **_GREEDY}
    expected = model.generate(tokens(40), past_key_values=_MAKE[kind](), **asked)
    found: list[Exception | None] = []

    def intrude() -> None:
        ids = tokens(60, 1)
        found.append(_Elsewhere(lambda: model.generate(ids, past_key_values=cache, **asked)).error)
        found.append(_Elsewhere(lambda: model(input_ids=ids, past_key_values=cache)).error)

    got = model.generate(tokens(40), past_key_values=cache, logits_processor=[_Pause(intrude, at)], **asked)
    assert len(found) == 2 and all(isinstance(error, CacheStateError) for error in found), found
    assert torch.equal(got, expected)


def test_any_call_from_two_threads(quick_switches: None) -> None:
    """Passes, crop, beams and copies at random from three threads: each succeeds or raises an error of ours."""
    model, cache = model_of("llama"), compressed_cache("llama")
    n_calls, n_errors = [0] * 3, [0] * 3

    def work(thread: int) -> None:
        generator = torch.Generator().manual_seed(thread)
        calls: list[Callable[[], object]] = [
            lambda: model(input_ids=tokens(5, thread), past_key_values=cache),
            lambda: cache.crop(-min(3, cache.get_seq_length())),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.__deepcopy__({}),
            cache.get_memory_stats,
            lambda: repr(cache),
            lambda: cache.update(*random_kv(1), 0),
            cache.reset,
        ]
        for _ in range(60):
            n_calls[thread] += 1
            try:
                with torch.no_grad():
                    calls[int(torch.randint(len(calls), (), generator=generator))]()
            except (KvlatheError, RuntimeError, IndexError):
                n_errors[thread] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_calls == [60] * 3
    cache.reset()
    with torch.no_grad():
        model(input_ids=tokens(60), past_key_values=cache)
        fresh = compressed_cache("llama")
        model(input_ids=tokens(60), past_key_values=fresh)
    assert _lengths(cache) == {60}
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


class _Elsewhere(threading.Thread):
    """Runs something in another thread, and hands back what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call, self.error = call, None
        self.start()
        self.join()

    def run(self) -> None:
        try:
            self.call()
        except Exception as error:
            self.error: Exception | None = error


def test_the_second_thread_is_told(quick_switches: None) -> None:
    """In the middle of a pass nobody else gets in, and the pass itself goes on undisturbed."""
    model, cache = tiny("llama"), compressed_cache("llama")
    model(input_ids=tokens(40), past_key_values=cache)
    found: list[Exception | None] = []
    intrusions: list[Callable[[], object]] = [
        lambda: model.model.layers[0](torch.zeros(1, 1, 64), past_key_values=cache),
        lambda: cache.get_mask_sizes(1, 0),
        lambda: cache.update(*random_kv(1), 1),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.__deepcopy__({}),
        lambda: pickle.dumps(cache),
    ]

    def intrude(*_: object) -> None:
        found.extend(_Elsewhere(call).error for call in intrusions[1:])
        assert _Elsewhere(cache.get_memory_stats).error is None

    hook = model.model.layers[1].register_forward_pre_hook(intrude)
    with torch.no_grad():
        disturbed = model(input_ids=tokens(1), past_key_values=cache).logits
    hook.remove()
    assert len(found) == 7 and all(isinstance(error, CacheStateError) for error in found), found
    fresh = compressed_cache("llama")
    with torch.no_grad():
        model(input_ids=tokens(40), past_key_values=fresh)
        assert torch.equal(disturbed, model(input_ids=tokens(1), past_key_values=fresh).logits)
    # The next pass may be another thread's.
    assert _Elsewhere(lambda: model(input_ids=tokens(1), past_key_values=cache)).error is None
    assert _lengths(cache) == {42}


def test_a_reset_in_the_middle_of_anothers_pass() -> None:
    model, cache = tiny("llama"), compressed_cache("llama")
    model(input_ids=tokens(40), past_key_values=cache)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: _Elsewhere(cache.reset) and None)
    with pytest.raises(CacheStateError, match="has been reset"):
        model(input_ids=tokens(1), past_key_values=cache)
    hook.remove()
    cache.reset()
    model(input_ids=tokens(40), past_key_values=cache)
    assert _lengths(cache) == {40}


# A process of its own: torch's threads, and those of the library, exist only in the parent.
_FORK = """
import json, os, signal, sys
import torch
from kvlathe import CompressedDynamicCache, Preset
from kvlathe.cache.expansions import Expansions
from kvlathe.cache.handout import Handout

torch.set_num_threads(3)
preset = Preset.load(sys.argv[1])
dim = preset.meta["head_dim"]
generator = torch.Generator().manual_seed(0)


def fill(cache, n_tokens):
    keys, values = (torch.randn(2, 2, n_tokens, dim, generator=generator) for _ in range(2))
    cache.update(keys, values, 0)


cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
fill(cache, 3000)
queries = torch.randn(2, 4, 1, dim, generator=generator)


def look():
    layer = cache.layers[0]
    out = Handout(layer, layer.store, 1, None, Expansions(), 0).attend(queries, mask=None, scaling=0.3)
    tensors = [out, layer.keys, layer.values]
    # Bytes, as torch's own operations on several threads may hang in a child.
    return [tensor.numpy().tobytes() for tensor in tensors]


expected = look()
outcomes = []
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        signal.alarm(3600)  # ends one that hangs
        status = 2
        try:
            same = look() == expected
            torch.set_num_threads(1)
            # A cache of the child's own, and the parent's one goes on in it.
            mine = CompressedDynamicCache.from_preset(preset, uncompressed_tail=8)
            for each in (mine, cache):
                fill(each, 500)
                each.crop(-700 if each is cache else -70)
                each.reorder_cache(torch.tensor([1, 0]))
                look()
            status = 0 if same and cache.get_seq_length() == 2800 and mine.get_seq_length() == 430 else 1
        finally:
            os._exit(status)
    outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    # The parent's threads are still its own.
    outcomes.append(0 if look() == expected else 1)
print(json.dumps(outcomes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use(tmp_path: Path) -> None:
    """Three threads have worked on a cache; children attend, read, fill, crop and reorder, and the parent goes on."""
    path = tmp_path / "preset.safetensors"
    preset_of("llama", 4.0, 32, head_dim=64).save(path)
    command = [sys.executable, "-c", _FORK, str(path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0] * 6


def test_a_pass_that_broke_off_before_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited for attention that never came is coded with the next pass, of another attention too."""
    model, cache, fresh = tiny("llama"), compressed_cache("llama", tail=0), compressed_cache("llama", tail=0)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        for each in (cache, fresh):
            model(input_ids=tokens(40), past_key_values=each)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(NativeStore, "attend", interrupt)
            model(input_ids=tokens(9, 1), past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [49, 40]
        cache.crop(0)
        model.set_attn_implementation("eager")
        got, expected = (
            model(input_ids=tokens(9, 2), past_key_values=each).logits for each in (cache, fresh)
        )
    assert torch.equal(got, expected)
    assert [layer.n_coded for layer in cache.layers] == [layer.n_coded for layer in fresh.layers]
