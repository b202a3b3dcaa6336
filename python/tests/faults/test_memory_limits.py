"""A process at its memory limit: what cannot be had raises, the cache is as it was, and goes on when there is more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_helpers import preset_of

# Appends until memory is out, for a while without any to spare; then lifts the limit, and compares with a cache that
# was never short of it.
_STARVE = """
import copy, gc, json, resource, sys
import torch
from kvlathe import CompressedDynamicCache, IdentityCompressor, Preset, ResourceError
from kvlathe.cache.expansions import Expansions
from kvlathe.preset_compressors import shared_compressor

torch.set_num_threads(1)
preset = Preset.load(sys.argv[1])
kind, spare_mb = json.loads(sys.argv[2])
N, DIM = 3000, preset.meta["head_dim"]


class Halves(torch.nn.Module):
    def compress(self, x):
        return x.half()

    def expand(self, coded):
        return coded.float()


exact, low_rank = IdentityCompressor(), shared_compressor(preset, 0, "value")


def make():
    if kind in ("streams", "blocks"):
        return CompressedDynamicCache.from_preset(preset, uncompressed_tail=64)
    pair = {"low rank": (low_rank, low_rank), "exact": (exact, exact), "user": (Halves(), low_rank)}[kind]
    return CompressedDynamicCache([pair[0]], [pair[1]], 1, uncompressed_tail=64)


generator = torch.Generator().manual_seed(0)
chunks = [[torch.randn(1, 2, N, DIM, generator=generator) for _ in range(2)] for _ in range(4)]
queries = torch.randn(1, 4, 300, DIM, generator=generator)


def append(cache, at):
    layer = cache.layers[0]
    if kind == "blocks" and layer.get_seq_length():
        keys, values = layer.hand_out(*chunks[at % 4], Expansions(), 0)
        keys.handout.attend(queries, mask=None, scaling=0.1)
    else:
        cache.update(*chunks[at % 4], 0)


def contents(cache):
    layer = cache.layers[0]
    return [layer.keys, layer.values]


def same(cache, other):
    assert (cache.layers[0].held, cache.layers[0].n_coded) == (other.layers[0].held, other.layers[0].n_coded)
    return all(torch.equal(a, b) for a, b in zip(contents(cache), contents(other)))


def attempt(call):
    global n_refused
    try:
        call()
    except MemoryError as error:
        assert isinstance(error, ResourceError) and "out of memory" in str(error), error
        n_refused += 1
        return False
    return True


warm = make()
append(warm, 0)
append(warm, 1)
del warm
gc.collect()
cache, n_refused, n_appended = make(), 0, 0
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + spare_mb * 2**20, resource.RLIM_INFINITY))
while attempt(lambda: append(cache, n_appended)):
    n_appended += 1
    assert n_appended < 3000, "nothing was refused"
# An attention call that was refused comes after its tokens: they are all there, exact.
n_held = cache.get_seq_length()
assert n_held in (N * n_appended, N * (n_appended + 1) if kind == "blocks" else N * n_appended)
for _ in range(10):
    before = (cache.layers[0].held, cache.layers[0].n_coded)
    for call in (
        lambda: cache.batch_repeat_interleave(64),
        lambda: [copy.deepcopy(cache) for _ in range(400)] and None,
        lambda: contents(cache) and [contents(cache) for _ in range(50)] and None,
    ):
        try:
            attempt(call)
        except RuntimeError as error:
            # Torch's own tensors, in a read by the caller.
            assert "allocate memory" in str(error)
            n_refused += 1
        gc.collect()
        if cache.layers[0].held != before[0]:
            # There was memory for it after all.
            cache.batch_select_indices(torch.tensor([0]))
    assert (cache.layers[0].held, cache.layers[0].n_coded) == before
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if n_held != N * n_appended:
    n_appended += 1
    # The next update codes what waited for that attention.
    cache.update(*(states[:, :, :0] for states in chunks[0]), 0)
fresh = make()
for at in range(n_appended):
    append(fresh, at)
assert same(cache, fresh)
for each in (cache, fresh):
    append(each, n_appended)
    each.crop(-(N + 37))
assert same(cache, fresh)
print(json.dumps([n_appended, n_refused]))
"""

_KINDS = ["streams", "blocks", "low rank", "exact", "user"]


def _run(program: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# One arena: what others have reserved would be memory beyond the limit.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PATH": ""}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space")
@pytest.mark.parametrize("kind", _KINDS)
def test_a_cache_survives_the_end_of_memory(
    tmp_path: Path, kind: str, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "preset.safetensors"
    preset_of("llama", 4.0, 32, head_dim=64).save(path)
    _, n_refused = _run(_STARVE, str(path), json.dumps([kind, 24]))
    assert n_refused >= 10
    record_property("calls without memory", n_refused)


# Little beyond what the process has: the next thread's stack finds no room. In a child there is no team to borrow,
# and the parent has had no threads whose stacks it could take over.
_NO_THREADS = """
import json, os, resource, sys, traceback
import torch
from kvlathe import CompressedDynamicCache, Preset, ResourceError
from kvlathe._native import Moments
from kvlathe.cache.expansions import Expansions
from kvlathe.cache.handout import Handout


def limit():
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**20, resource.RLIM_INFINITY))


def coded(cache):
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    out = Handout(layer, layer.store, 300, None, Expansions(), 0).attend(queries, mask=None, scaling=0.1)
    return layer.n_coded, out.numpy().tobytes()


torch.set_num_threads(1)
preset = Preset.load(sys.argv[1])
generator = torch.Generator().manual_seed(0)
keys = torch.randn(1, 2, 200, 64, generator=generator)
queries = torch.randn(1, 4, 1, 64, generator=generator)
new = lambda: CompressedDynamicCache.from_preset(preset, uncompressed_tail=0)
cache, expected = new(), coded(new())
moments = Moments([(2, 64, 64, None)])
child = os.fork()
if child == 0:
    try:
        torch.set_num_threads(4)
        limit()
        n_threads = len(os.listdir("/proc/self/task"))
        assert coded(cache) == expected
        assert len(os.listdir("/proc/self/task")) == n_threads
        try:
            moments.add(0, "key", keys[0, :, :100].contiguous(), None, 0, 4)
            refused = ""
        except ResourceError as error:
            refused = str(error)
        assert "cannot start 1 threads" in refused, refused
        assert moments.n_tokens == 0
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(expected[0]))
sys.exit(failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space")
def test_no_room_for_a_thread(tmp_path: Path) -> None:
    """Without threads to be had a cache does all on the caller's, with the same bits; calibration raises."""
    path = tmp_path / "preset.safetensors"
    preset_of("llama", 4.0, 32, head_dim=64).save(path)
    assert _run(_NO_THREADS, str(path)) == 188
