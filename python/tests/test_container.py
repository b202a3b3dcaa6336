"""Caches saved to files: loaded in the same process and in another one, they go on to the bit; and what is refused."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_helpers import (
    compressed_cache,
    identity_cache,
    low_rank,
    model_of,
    preset_of,
    random_kv,
    served,
    tokens,
)
from kvlathe import (
    CacheStateError,
    CompressedDynamicCache,
    ContainerError,
    IdentityCompressor,
    ModelError,
    PresetError,
    ShapeError,
)
from kvlathe.model_identity import model_identity
from kvlathe.model_loading import LoadedModel
from kvlathe.preset import Preset
from kvlathe.stores.foreign import ForeignStore
from tiny_models import tiny


def logits(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


def filled(name: str, n_tokens: int = 150, batch: int = 1) -> CompressedDynamicCache:
    cache = compressed_cache(name)
    logits(model_of(name), cache, tokens(n_tokens, batch=batch))
    return cache


@pytest.mark.parametrize("n_tokens", [3, 20, 150])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2", "qwen3"])
def test_it_goes_on_to_the_same_bits(name: str, n_tokens: int, tmp_path: Path) -> None:
    """Windows, sinks only, several families."""
    with served(model_of(name)) as model:
        cache = compressed_cache(name)
        logits(model, cache, tokens(n_tokens, batch=2))
        cache.save(tmp_path / "cache.kvl")
        twin = CompressedDynamicCache.load(tmp_path / "cache.kvl", model=model)
        stats, of_twin = cache.get_memory_stats(), twin.get_memory_stats()
        for key in ("seq_len", "compressed_tokens", "window_layers", "uncompressed_tail"):
            assert of_twin[key] == stats[key]
        assert of_twin["imported_bytes"] == of_twin["coded_bytes"]
        assert (of_twin["coded_bytes"] > 0) == (n_tokens > 20)
        for step, n_new in enumerate((1, 30, 1)):
            ids = tokens(n_new, batch=2, seed=9 + step)
            assert torch.equal(logits(model, cache, ids), logits(model, twin, ids))
        assert twin.get_memory_stats()["compressed_tokens"] == cache.get_memory_stats()["compressed_tokens"]
        assert twin.get_memory_stats()["expanded_layers"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model, preset = tiny("llama").to(dtype), preset_of("llama")
    cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=9)
    logits(model, cache, tokens(70))
    cache.save(tmp_path / "cache.kvl")
    twin = CompressedDynamicCache.load(tmp_path / "cache.kvl", preset=preset)
    assert twin.layers[0].keys.dtype == dtype and torch.equal(twin.layers[0].keys, cache.layers[0].keys)
    assert torch.equal(logits(model, cache, tokens(5)), logits(model, twin, tokens(5)))


def test_padded_batches_and_beams(tmp_path: Path) -> None:
    model, cache = model_of("llama"), compressed_cache("llama")
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :20] = 0
    logits(model, cache, tokens(90, batch=2), mask)
    path = tmp_path / "cache.kvl"
    cache.save(path)
    coded_bytes = CompressedDynamicCache.load(path).get_memory_stats()["coded_bytes"]
    cache.batch_repeat_interleave(3)
    cache.save(path)
    twin = CompressedDynamicCache.load(path, model=model)
    assert twin.layers[0].padding == cache.layers[0].padding is not None
    # What beams share is in the file once, and shared again by those who load it.
    assert twin.get_memory_stats()["coded_bytes"] == coded_bytes
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1).repeat_interleave(3, 0)
    for step in range(3):
        beams = torch.tensor([0, 0, 2, 5, 3, 3])
        ids = tokens(1, step, 6)
        assert torch.equal(*(logits(model, each, ids, mask) for each in (cache, twin)))
        cache.reorder_cache(beams)
        twin.reorder_cache(beams)
        mask = torch.cat([mask, torch.ones(6, 1, dtype=torch.long)], 1)


def test_generation_with_beams_and_an_assistant_goes_on(tmp_path: Path) -> None:
    """A rollback may still come where an assistant has guessed: coding waits, before and after."""
    model, path = model_of("llama"), tmp_path / "cache.kvl"
    prompt = tokens(60)
    cases: list[dict[str, Any]] = [
        {"num_beams": 3},
        {"assistant_model": model_of("llama")},
        {"do_sample": False},
    ]
    for options in cases:
        cache = compressed_cache("llama")
        before = model.generate(
            prompt, past_key_values=cache, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **options
        )
        if "num_beams" in options:
            cache.batch_select_indices(torch.tensor([0]))
            options = {}
        cache.save(path, before)
        twin = CompressedDynamicCache.load(path, model=model)
        assert twin.layers[0].record_past == cache.layers[0].record_past
        ids = torch.cat([twin.loaded_token_ids, tokens(30, seed=4)], 1)
        after = [
            model.generate(
                ids, past_key_values=each, max_new_tokens=40, pad_token_id=0, eos_token_id=None, **options
            )
            for each in (cache, twin)
        ]
        assert torch.equal(*after)


def test_the_ids_come_along(tmp_path: Path) -> None:
    cache, ids = filled("llama", 40, batch=2), tokens(40, batch=2)
    cache.save(tmp_path / "cache.kvl", torch.cat([ids, ids[:, :1]], 1))
    loaded = CompressedDynamicCache.load(tmp_path / "cache.kvl", preset=preset_of("llama")).loaded_token_ids
    assert loaded is not None and torch.equal(loaded, ids)
    cache.save(tmp_path / "cache.kvl")
    assert CompressedDynamicCache.load(tmp_path / "cache.kvl").loaded_token_ids is None
    for wrong in (ids[:, 1:], ids[:1], ids.float(), ids - 200, ids[0, 0], ids + 2**40):
        with pytest.raises(ShapeError, match="token_ids"):
            cache.save(tmp_path / "other.kvl", wrong)
    assert not (tmp_path / "other.kvl").exists()
    one = filled("llama", 40)
    one.save(tmp_path / "cache.kvl", tokens(40)[0].tolist())
    loaded = CompressedDynamicCache.load(tmp_path / "cache.kvl").loaded_token_ids
    assert loaded is not None and torch.equal(loaded, tokens(40))


def test_cropped_copied_and_saved_again(tmp_path: Path) -> None:
    """A loaded cache is a cache, even one that is saved over its own file."""
    model, path = model_of("llama"), tmp_path / "cache.kvl"
    cache = filled("llama")
    cache.save(path)
    twin = CompressedDynamicCache.load(path, model=model)
    for each in (cache, twin):
        each.crop(-40)
        logits(model, each, tokens(25, seed=1))
    twin.save(path)
    again = copy.deepcopy(CompressedDynamicCache.load(path))
    results = [logits(model, each, tokens(3, seed=2)) for each in (cache, twin, again)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    again.reset()
    assert again.get_seq_length() == 0


def test_a_store_of_torch_tensors_reads_and_writes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's does."""
    native = filled("llama")
    native.save(tmp_path / "native.kvl")
    monkeypatch.setattr("kvlathe.cache.layer.make_store", ForeignStore)
    twin = CompressedDynamicCache.load(tmp_path / "native.kvl")
    assert isinstance(twin.layers[0].store, ForeignStore)
    torch.testing.assert_close(twin.layers[1].keys, native.layers[1].keys, rtol=1e-5, atol=1e-5)
    twin.save(tmp_path / "foreign.kvl")
    assert (tmp_path / "foreign.kvl").read_bytes() == (tmp_path / "native.kvl").read_bytes()


_OTHER = """
import sys, torch
from kvlathe import CompressedDynamicCache, Preset
sys.path.insert(0, {tests!r})
from tiny_models import tiny
torch.set_num_threads(1)
preset, model = Preset.load({preset!r}), tiny("gemma3")
cache = CompressedDynamicCache.load({path!r}, model=model)
assert cache.get_memory_stats()["imported_bytes"] > 0
assert any(line.rstrip().endswith({path!r}) for line in open("/proc/self/maps"))
out = model.generate(
    torch.cat([cache.loaded_token_ids, torch.tensor([[5, 6]])], 1), past_key_values=cache, max_new_tokens=60,
    do_sample=False, eos_token_id=None, pad_token_id=0)
print(out[0].tolist())
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    model, cache, path = model_of("gemma3"), compressed_cache("gemma3"), tmp_path / "cache.kvl"
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(tokens(90), past_key_values=cache, max_new_tokens=20, **options)
    cache.save(path, ids)
    preset_of("gemma3").save(tmp_path / "preset.safetensors")
    code = _OTHER.format(
        tests=str(Path(__file__).parent), preset=str(tmp_path / "preset.safetensors"), path=str(path)
    )
    ids = torch.cat([ids[:, : cache.get_seq_length()], torch.tensor([[5, 6]])], 1)
    expected = model.generate(ids, past_key_values=cache, max_new_tokens=60, **options)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(expected[0].tolist())


_SMOLLM2 = """
import sys, torch
from kvlathe import CompressedDynamicCache, load_model
torch.set_num_threads(1)
loaded = load_model("smollm2")
cache = CompressedDynamicCache.load({path!r}, model=loaded.model)
ids = torch.cat([cache.loaded_token_ids, torch.tensor([[198, 504]])], 1)
print(loaded.model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)[0].tolist())
"""


@pytest.mark.slow_model
def test_a_real_model_goes_on_in_another_process(
    smollm2: LoadedModel, bundled_preset: Preset, tmp_path: Path
) -> None:
    model, path = smollm2.model, tmp_path / "chat.kvl"
    cache = CompressedDynamicCache.from_preset(bundled_preset, model=model, uncompressed_tail=0)
    text = "The history of the printing press begins long before movable type. " * 30
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    cache.save(path, out)
    ids = torch.cat([out[:, : cache.get_seq_length()], torch.tensor([[198, 504]])], 1)
    expected = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
    found = subprocess.run(
        [sys.executable, "-c", _SMOLLM2.format(path=str(path))], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(expected[0].tolist())


def test_other_presets_models_and_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvl"
    filled("llama").save(path)
    with pytest.raises(PresetError, match="at the same rate"):
        CompressedDynamicCache.load(path, preset=preset_of("llama", bits=3.0))
    with pytest.raises(PresetError):
        CompressedDynamicCache.load(path, model=model_of("qwen3"))
    other = tiny("llama", seed=1)
    with pytest.raises(ModelError, match="other weights"):
        CompressedDynamicCache.load(path, model=other)
    # Without a model nobody can know: whoever wrote it did not say.
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), uncompressed_tail=16)
    logits(model_of("llama"), cache, tokens(50))
    cache.save(path)
    CompressedDynamicCache.load(path, model=other)
    cache.save(path, model=model_of("llama"))
    # A cache that is loaded and saved again remembers whose it is.
    CompressedDynamicCache.load(path).save(path)
    with pytest.raises(ModelError, match="other weights"):
        CompressedDynamicCache.load(path, model=other)


def test_an_identity_is_that_of_the_weights() -> None:
    model = tiny("llama")
    first = model_identity(model)
    assert first == model_identity(tiny("llama")) == model_identity(torch.nn.ModuleDict({"inner": model}))
    assert first != model_identity(tiny("llama", seed=1))
    assert first != model_identity(tiny("llama").to(torch.bfloat16))
    # One matrix of a fine-tune.
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert model_identity(model) != first
    longer = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 2e4})
    assert model_identity(longer) != first
    with pytest.raises(ModelError, match="meta"):
        model_identity(tiny("llama").to("meta"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: identity_cache(model_of("llama")),
        lambda: CompressedDynamicCache([IdentityCompressor()], [low_rank()], num_layers=1),
    ],
    ids=["exact", "by rank"],
)
def test_caches_without_a_preset_are_refused(make: Any, tmp_path: Path) -> None:
    cache = make()
    for layer in range(len(cache.layers)):
        cache.update(*random_kv(30), layer)
    with pytest.raises(PresetError, match=r"from_preset.*torch\.save"):
        cache.save(tmp_path / "cache.kvl")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_says_why(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvl"
    with pytest.raises(CacheStateError, match="hold nothing"):
        compressed_cache("llama").save(path)
    cache = filled("llama")
    cache.layers[0].crop(-1)
    with pytest.raises(CacheStateError, match="unlike"):
        cache.save(path)
    with pytest.raises(ModelError, match=r"transformers' own .*torch\.save"):
        identity_cache(model_of("qwen3_next")).save(path)
    with pytest.raises(ModelError, match=r"layer 0 keeps a state .*torch\.save"):
        filled("falcon_h1").save(path)
    assert not path.exists()
    for nowhere in (tmp_path / "no folder" / "cache.kvl", tmp_path):
        with pytest.raises(ContainerError, match=str(nowhere)):
            filled("llama").save(nowhere)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04", r"torch\.save"),
        (b"\x80\x04K\x01.", "pickle"),
        (b"no cache", "no saved cache"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ContainerError, match=message):
        CompressedDynamicCache.load(path)
    with pytest.raises(ContainerError, match="nothing here"):
        CompressedDynamicCache.load(tmp_path / "nothing here")
    with pytest.raises(ContainerError, match="no ordinary file"):
        CompressedDynamicCache.load(tmp_path)


def test_a_damaged_file_names_the_block(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvl"
    filled("llama").save(path)
    content = path.read_bytes()
    for at in random.Random(0).sample(range(len(content)), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ContainerError):
            CompressedDynamicCache.load(path)
    path.write_bytes(content[:-1] + b"\xff")
    with pytest.raises(ContainerError, match=r"block \d+ of row 0 \(layer 1, values\) is damaged"):
        CompressedDynamicCache.load(path)
    path.write_bytes(content[:-64])
    with pytest.raises(ContainerError, match="cut short"):
        CompressedDynamicCache.load(path)


_WRITER = """
import sys
from kvlathe import CompressedDynamicCache, Preset
preset = Preset.load({preset!r})
caches = [CompressedDynamicCache.load(path) for path in {sources!r}]
print("ready", flush=True)
while True:
    for cache in caches:
        cache.save({path!r})
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    """At whatever byte: the file is that of one save or of the next."""
    sources = []
    for n_tokens in (60, 700):
        filled("llama", n_tokens).save(tmp_path / f"{n_tokens}.kvl")
        sources.append(str(tmp_path / f"{n_tokens}.kvl"))
    preset_of("llama").save(tmp_path / "preset.safetensors")
    path = tmp_path / "cache.kvl"
    filled("llama", 60).save(path)
    code = _WRITER.format(preset=str(tmp_path / "preset.safetensors"), sources=sources, path=str(path))
    seed = random.Random(1)
    whole = {Path(source).read_bytes() for source in sources}
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
            try:
                assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
                for _ in range(20):
                    assert path.read_bytes() in whole
                    CompressedDynamicCache.load(path)
                    time.sleep(seed.random() * 0.01)
            finally:
                writer.kill()
        assert path.read_bytes() in whole
        CompressedDynamicCache.load(path)
