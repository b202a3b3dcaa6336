"""Caches pickled and saved with torch, loaded in the same process and in another one."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

from cache_helpers import (
    compressed_cache,
    identity_cache,
    low_rank,
    model_of,
    preset_of,
    random_kv,
    stream_compressor,
    tokens,
)
from kvlathe import (
    CompressedDynamicCache,
    IdentityCompressor,
    PicklingError,
    Preset,
    PresetError,
    StreamSetCompressor,
)
from kvlathe._native import StreamSetCodec
from kvlathe.cache.layer import CompressedLayer
from kvlathe.cache.mixed_layer import CompressedMixedLayer
from kvlathe.saved import by_maker
from kvlathe.stores import Policy
from tiny_models import tiny


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def saved(cache: Any) -> Any:
    """With torch's own safe loader."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


def mapped(cache: Any, path: Path) -> Any:
    torch.save(cache, path)
    return torch.load(path, mmap=True)


def logits(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("how", ["pickle", "torch", "torch mapped"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_a_saved_cache_goes_on_to_the_same_bits(name: str, how: str, tmp_path: Path) -> None:
    model, cache = model_of(name), compressed_cache(name)
    logits(model, cache, tokens(150, batch=2))
    if how == "pickle":
        twin = pickled(cache)
    else:
        twin = saved(cache) if how == "torch" else mapped(cache, tmp_path / "cache.pt")
    stats, of_twin = cache.get_memory_stats(), twin.get_memory_stats()
    assert (
        of_twin["seq_len"] == stats["seq_len"] and of_twin["compressed_tokens"] == stats["compressed_tokens"]
    )
    assert stats["imported_bytes"] == 0 and of_twin["imported_bytes"] == of_twin["coded_bytes"] > 0
    for step, n_new in enumerate((1, 30, 1)):
        ids = tokens(n_new, batch=2, seed=9 + step)
        assert torch.equal(logits(model, cache, ids), logits(model, twin, ids))
    assert twin.get_memory_stats()["compressed_tokens"] == cache.get_memory_stats()["compressed_tokens"]


def test_padding_and_exact_layers_come_along() -> None:
    model, cache = model_of("llama"), compressed_cache("llama")
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :20] = 0
    logits(model, cache, tokens(90, batch=2), mask)
    twin = saved(cache)
    assert twin.layers[0].padding == cache.layers[0].padding is not None
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert torch.equal(*(logits(model, each, tokens(1, 3, 2), mask) for each in (cache, twin)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CompressedDynamicCache([IdentityCompressor()], [low_rank()], num_layers=1),
        lambda: CompressedDynamicCache([IdentityCompressor()], [IdentityCompressor()], num_layers=1),
        lambda: CompressedDynamicCache(
            [stream_compressor()], [low_rank()], num_layers=1, uncompressed_tail=9
        ),
    ],
    ids=["values by rank", "exact", "mixed"],
)
@pytest.mark.parametrize("save", [pickled, saved])
def test_every_store_is_saved(save: Callable[[Any], Any], make: Callable[[], CompressedDynamicCache]) -> None:
    preset = preset_of("llama")  # held, as a user's is
    cache = make()
    cache.update(*random_kv(100), 0)
    twin = save(cache)
    assert preset.digest
    for each in (cache, twin):
        each.update(*random_kv(20, seed=1), 0)
    assert torch.equal(twin.layers[0].keys, cache.layers[0].keys)
    assert torch.equal(twin.layers[0].values, cache.layers[0].values)
    assert twin.layers[0].n_coded == cache.layers[0].n_coded


def test_an_empty_cache_is_saved() -> None:
    twin = pickled(compressed_cache("llama"))
    assert twin.get_seq_length() == 0
    logits(model_of("llama"), twin, tokens(40))


def _in_another_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_another_process_needs_the_preset(tmp_path: Path) -> None:
    preset = preset_of("llama", 3.0)
    preset.save(tmp_path / "preset.safetensors")
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=9)
    for layer in range(preset.n_layers):
        cache.update(*random_kv(100, seed=layer), layer)
    path = tmp_path / "cache.pickle"
    path.write_bytes(pickle.dumps(cache))
    load = f"""
import pickle
from pathlib import Path
cache = pickle.loads(Path({str(path)!r}).read_bytes())
print(cache.get_seq_length(), cache.layers[0].keys.double().sum().item().hex())
"""
    without = _in_another_process(load)
    assert without.returncode == 1
    assert "PresetError" in without.stderr and "load it first" in without.stderr, without.stderr
    assert str(preset.digest)[:12] in without.stderr

    first = f"import kvlathe; preset = kvlathe.Preset.load({str(tmp_path / 'preset.safetensors')!r})"
    done = _in_another_process(first + load)
    assert done.returncode == 0, done.stderr
    expected = cache.layers[0].keys.double().sum().item().hex()
    assert done.stdout.split() == ["100", expected]


def _things(preset: Preset) -> dict[str, Any]:
    """All that somebody may save, and one of each kind of layer."""
    codec = preset.codec(0, "key")
    assert isinstance(codec, StreamSetCodec)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=9)
    for layer in range(preset.n_layers):
        cache.update(*random_kv(100, seed=layer), layer)
    parts = cache.layers[0].export_parts()
    things = {
        "cache": cache,
        "empty": CompressedDynamicCache.from_preset(preset, uncompressed_tail=0),
        "layer": cache.layers[0],
        "parts": parts,
        "side": parts.value,
        "block": parts.key.blocks[0][1],
        "several": {"caches": [cache, cache.layers[1]], "of": ("llama", 1)},
        "preset": preset,
        "identity": IdentityCompressor(),
        "low rank": low_rank(),
        "stream set": StreamSetCompressor(codec, 4),
    }
    return things


_LOAD_ALL = """
import sys, warnings
{imports}
import torch
from pathlib import Path
folder = Path({folder!r})
preset = kvlathe.Preset.load(folder / "preset.safetensors")
assert "kvlathe.cache" not in sys.modules
for path in sorted(folder.glob("*.pt")):
    thing = torch.load(path)
    print(path.stem, type(thing).__name__)
mapped = torch.load(folder / "cache.pt", mmap=True)
assert mapped.get_memory_stats()["imported_bytes"] > 0
print(mapped.layers[1].keys.double().sum().item().hex())
"""


@pytest.mark.parametrize(
    ("imports", "first"),
    [("import kvlathe", "cache.pt"), ("import kvlathe", "block.pt"), ("import torch, kvlathe", "cache.pt")],
)
def test_importing_kvlathe_is_enough(imports: str, first: str, tmp_path: Path) -> None:
    """For whatever is loaded first, and whether torch was imported before or after."""
    preset = preset_of("llama")
    preset.save(tmp_path / "preset.safetensors")
    things = _things(preset)
    for name, thing in things.items():
        torch.save(thing, tmp_path / f"{name}.pt")
    (tmp_path / first).rename(tmp_path / "0.pt")
    (tmp_path / "cache.pt").exists() or torch.save(things["cache"], tmp_path / "cache.pt")
    done = _in_another_process(_LOAD_ALL.format(imports=imports, folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    *lines, total = done.stdout.splitlines()
    assert len(lines) >= len(things)
    expected = {name: type(thing).__name__ for name, thing in things.items()}
    expected["0"] = expected[first.removesuffix(".pt")]
    for line in lines:
        name, kind = line.rsplit(" ", 1)
        assert kind == expected[name]
    assert total == things["cache"].layers[1].keys.double().sum().item().hex()


def test_torch_says_what_to_do_without_kvlathe(tmp_path: Path) -> None:
    torch.save(compressed_cache("llama"), tmp_path / "cache.pt")
    done = _in_another_process(f"import torch; torch.load({str(tmp_path / 'cache.pt')!r})")
    assert done.returncode == 1 and "import_kvlathe_first" in done.stderr


def test_importing_kvlathe_does_not_import_torch() -> None:
    done = _in_another_process("import kvlathe, sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_a_torch_that_cannot_be_told_is_still_imported() -> None:
    """An older one, or one with a loader of its own kind."""
    done = _in_another_process("""
import sys, kvlathe
from importlib.machinery import ModuleSpec
from types import ModuleType

class Slim:
    __slots__ = ()
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.loaded = True

class Ancient:
    def find_module(self, name, path=None):
        return None

class Finder:
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, Slim(), is_package=name == "torch") if name.startswith("torch") else None

sys.meta_path.insert(1, Finder())  # behind what waits for torch
sys.meta_path.insert(1, Ancient())
import torch.serialization
assert torch.serialization.loaded
""")
    assert done.returncode == 0, done.stderr


def _named_in(thing: Any) -> set[str]:
    """Classes and functions that a file of it names."""
    file = io.BytesIO()
    torch.save(thing, file)
    with zipfile.ZipFile(file) as archive:
        (content,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {argument for code, argument, _ in pickletools.genops(content) if code.name == "GLOBAL"}


def test_files_name_one_function_of_ours() -> None:
    """No class, whose attributes a file could set at will."""
    for name, thing in _things(preset_of("llama")).items():
        ours = {
            named for named in _named_in(thing) if not named.startswith(("torch", "collections", "_codecs"))
        }
        assert ours == {"kvlathe.saved import_kvlathe_first"}, name


# Layers of transformers' own.


@pytest.mark.parametrize("save", [pickled, saved])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "deepseek_v3"])
def test_layers_of_transformers_own_come_along(name: str, save: Callable[[Any], Any]) -> None:
    model = tiny(name)
    cache = identity_cache(model)
    assert not all(isinstance(layer, CompressedLayer) for layer in cache.layers)
    logits(model, cache, tokens(60))
    twin = save(cache)
    assert [type(layer) for layer in twin.layers] == [type(layer) for layer in cache.layers]
    for step in range(3):
        ids = tokens(1, seed=step)
        assert torch.equal(logits(model, cache, ids), logits(model, twin, ids))


@pytest.mark.parametrize("save", [pickled, saved])
def test_states_beside_keys_and_values_come_along(save: Callable[[Any], Any]) -> None:
    model = tiny("falcon_h1")
    cache = compressed_cache("falcon_h1", tail=9)
    logits(model, cache, tokens(60))
    twin = save(cache)
    assert all(type(layer) is CompressedMixedLayer for layer in twin.layers)
    for step in range(3):
        ids = tokens(1, seed=step)
        assert torch.equal(logits(model, cache, ids), logits(model, twin, ids))


def test_layers_of_both_kinds_in_one_cache() -> None:
    """A calibrated layer, and beside it one of every kind that transformers makes of a config."""
    preset_of("llama")
    cache = CompressedDynamicCache(
        [stream_compressor()] * 2, [low_rank()] * 2, num_layers=2, uncompressed_tail=9
    )
    cache.update(*random_kv(80), 0)
    kinds = list(dict.fromkeys(DYNAMIC_LAYER_TYPE_MAPPING.values()))
    assert len(kinds) >= 4
    cache.layers[1:] = [kind(sliding_window=20) for kind in kinds]
    attending = [
        layer for layer in cache.layers[1:] if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    for layer in attending:
        layer.update(*random_kv(50))
    twin = saved(cache)
    assert torch.equal(twin.layers[0].keys, cache.layers[0].keys)
    assert [type(layer) for layer in twin.layers[1:]] == kinds
    for ours, theirs in zip(twin.layers[1:], cache.layers[1:], strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        if theirs in attending:
            for a, b in zip(ours.update(*random_kv(1)), theirs.update(*random_kv(1)), strict=True):
                assert torch.equal(a, b)


def test_a_layer_that_transformers_does_not_know_is_named() -> None:
    content = by_maker("stock layer", "transformers.models.nothing.modeling_nothing", "NothingLayer", {})
    make, data = content
    with pytest.raises(PicklingError, match=r"NothingLayer.*import transformers\.models\.nothing"):
        make(*data)


class Own(CompressedDynamicCache):
    """Somebody's subclass."""


def test_a_subclass_keeps_its_class_and_attributes() -> None:
    cache = Own([IdentityCompressor()], [low_rank()], num_layers=1)
    cache.note = "mine"
    cache.update(*random_kv(40), 0)
    twin = pickled(cache)
    assert type(twin) is Own and twin.note == "mine" and twin.get_seq_length() == 40
    with pytest.raises(pickle.UnpicklingError, match="Own"):
        saved(cache)
    with torch.serialization.safe_globals([Own]):
        assert type(saved(cache)) is Own


class Halves(nn.Module):
    """A user's compressor."""

    def compress(self, x: Tensor) -> Tensor:
        return x.half()

    def expand(self, coded: Tensor) -> Tensor:
        return coded.float()


def test_a_users_compressor_is_named_to_torch() -> None:
    cache = CompressedDynamicCache([Halves()], [low_rank()], num_layers=1)
    cache.update(*random_kv(100), 0)
    with pytest.raises(pickle.UnpicklingError, match="Halves"):
        saved(cache)
    with torch.serialization.safe_globals([Halves]):
        twins = [pickled(cache), saved(cache)]
    for twin in twins:
        assert twin.layers[0].n_coded == cache.layers[0].n_coded == 96
        assert torch.equal(twin.layers[0].keys, cache.layers[0].keys)
        assert torch.equal(twin.layers[0].values, cache.layers[0].values)


def test_a_file_holds_nothing_but_what_the_cache_holds() -> None:
    """Not what was cropped, nor the blocks beside one that is saved alone."""
    size = {}
    for n_tokens in (64, 640):
        layer = CompressedLayer(IdentityCompressor(), low_rank(), Policy(0, 0, 0))
        layer.update(*random_kv(n_tokens))
        layer.crop(64 - n_tokens)
        size[n_tokens] = len(pickle.dumps(layer))
    assert size[640] < 1.2 * size[64]
    cache = compressed_cache("llama", tail=9)
    cache.update(*random_kv(2000), 0)
    (row,) = saved(cache).layers[0].export_parts().key.blocks
    assert len(pickle.dumps(row[5])) < 5 * row[5].data.numel() + 2000


def test_parts_that_are_not_alike_are_saved_as_they_are() -> None:
    cache = compressed_cache("llama", tail=9)
    cache.update(*random_kv(100, batch=2), 0)
    exported = cache.layers[0].export_parts().key
    key = dataclasses.replace(exported, blocks=[list(row) for row in exported.blocks])
    key.blocks[1][3] = dataclasses.replace(key.blocks[1][3], layer=7)
    key.blocks[0].pop()
    twin = pickled(key)
    assert [[(b.layer, b.first_position, bytes(b)) for b in row] for row in twin.blocks] == [
        [(b.layer, b.first_position, bytes(b)) for b in row] for row in key.blocks
    ]


def test_a_restored_layer_is_where_its_tokens_are() -> None:
    """`map_location` moves tensors, and not what the cache was made for."""
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), uncompressed_tail=9, device="cpu")
    cache.update(*random_kv(100), 0)
    cache.layers[0]._wanted_device = torch.device("cuda:7")  # as if the file came from there
    twin = saved(cache)
    twin.update(*random_kv(1), 0)
    assert twin.get_seq_length() == 101


def test_another_preset_does_not_read_it() -> None:
    """A preset that was changed on disk has another digest."""
    preset = preset_of("llama", 3.25)
    assert preset.digest != preset_of("llama", 3.5).digest
    content = pickle.dumps(stream_compressor(bits=3.25))
    assert preset.digest
    name = bytes(str(preset.digest), "ascii")
    assert name in content
    with pytest.raises(PresetError, match="not loaded in this process"):
        pickle.loads(content.replace(name, name[::-1]))


def test_a_copy_of_a_layer_does_not_share_its_store() -> None:
    layer = compressed_cache("llama").layers[0]
    layer.update(*random_kv(40))
    twin = copy.copy(layer)
    layer.update(*random_kv(10))
    assert (twin.get_seq_length(), layer.get_seq_length()) == (40, 50)
