"""What a user can get wrong: an error of ours that names what was given and what is expected, and no harm done."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kvlathe
from cache_helpers import (
    compressed_cache,
    identity_cache,
    low_rank,
    model_of,
    one_layer_cache,
    orthonormal,
    preset_of,
    random_kv,
    seed_preset,
    stream_compressor,
    tokens,
    write_json,
)
from kvlathe import (
    CompressedDynamicCache,
    IdentityCompressor,
    Preset,
    QuantizedCalibratedCompressor,
    StreamSetCompressor,
    load_preset_cache,
)
from kvlathe._native import Preset as NativePreset
from kvlathe.errors import (
    BudgetError,
    CalibrationError,
    DeviceError,
    DtypeError,
    KvlatheError,
    NonFiniteError,
    PresetError,
    ShapeError,
)


class Tagged(nn.Module):
    """A user's compressor: whatever stands next to it is kept by the torch store."""

    def compress(self, x: Tensor) -> Tensor:
        return x.clone()

    def expand(self, coded: Tensor) -> Tensor:
        return coded


class PlainStreams(StreamSetCompressor):
    """The calibrated codec by way of the torch store."""


def _torch_streams() -> CompressedDynamicCache:
    return one_layer_cache(
        PlainStreams(stream_compressor(side="key").native),
        PlainStreams(stream_compressor(side="value").native),
    )


CACHES: dict[str, Callable[[], CompressedDynamicCache]] = {
    "native_streams": lambda: one_layer_cache(stream_compressor(side="key"), stream_compressor(side="value")),
    "torch_streams": _torch_streams,
    "native_low_rank": lambda: one_layer_cache(low_rank(), low_rank()),
    "values_only": lambda: one_layer_cache(IdentityCompressor(), low_rank()),
    "user": lambda: one_layer_cache(Tagged(), low_rank()),
    "identity": lambda: one_layer_cache(IdentityCompressor(), IdentityCompressor()),
}
CODED = [kind for kind in CACHES if kind != "identity"]


@pytest.fixture(params=CACHES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def filled(kind: str) -> CompressedDynamicCache:
    """A cache of each kind with 40 tokens of a batch of 2."""
    cache = CACHES[kind]()
    cache.update(*random_kv(40, batch=2), 0)
    return cache


def _snapshot(cache: CompressedDynamicCache) -> tuple[Any, ...]:
    return tuple(
        (layer.get_seq_length(), layer.n_coded, layer.keys, layer.values, layer.memory_use())
        for layer in cache.layers
    )


def _assert_unchanged(cache: CompressedDynamicCache, before: tuple[Any, ...]) -> None:
    for given_, expected in zip(_snapshot(cache), before, strict=True):
        for a, b in zip(given_, expected, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _refuses(
    cache: CompressedDynamicCache,
    keys: Tensor,
    values: Tensor,
    error: type[KvlatheError],
    *mentions: str,
    layer: int = 0,
) -> None:
    """`update` raises, says what matters, and leaves the cache as it was."""
    before = _snapshot(cache)
    with pytest.raises(error) as caught:
        cache.update(keys, values, layer)
    assert isinstance(caught.value, KvlatheError)
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)
    _assert_unchanged(cache, before)


def test_all_errors_derive_from_ours() -> None:
    names = [name for name in kvlathe.__all__ if name.endswith("Error")]
    assert len(names) >= 10
    for name in names:
        assert issubclass(getattr(kvlathe, name), KvlatheError)
        assert getattr(kvlathe, name).__doc__


# Presets that do not fit the model.


def test_a_preset_with_another_number_of_layers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "p.json", seed_preset(3, 4, 16, 12))
    with pytest.raises(PresetError, match=r"tests/tiny with 3 layers, the model has 2"):
        load_preset_cache(path, 2, "cpu")


@pytest.mark.parametrize("make", [compressed_cache, None], ids=["native", "seed"])
@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (2, 32), (1, 16), (2, 8)])
def test_a_preset_with_other_heads(
    tmp_path: Path, make: Callable[[str], CompressedDynamicCache] | None, heads: int, dim: int
) -> None:
    if make is None:
        path = write_json(tmp_path / "p.json", seed_preset(2, 4, 16, 12))
        cache = load_preset_cache(path, 2, "cpu")
        if dim == 16:  # the seed's basis is shared by all heads, however many
            cache.update(*random_kv(9, heads=heads, dim=dim), 0)
            return
    else:
        cache = make("llama")
    given_, expected = (dim, 16) if dim != 16 else (heads, 2)
    _refuses(cache, *random_kv(9, heads=heads, dim=dim), ShapeError, str(given_), str(expected))
    assert cache.get_seq_length() == 0
    cache.update(*random_kv(9), 0)  # and works with what fits
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (2, 32)])
def test_a_preset_with_other_heads_in_the_torch_store(heads: int, dim: int) -> None:
    given_, expected = (dim, 16) if dim != 16 else (heads, 2)
    _refuses(_torch_streams(), *random_kv(9, heads=heads, dim=dim), ShapeError, str(given_), str(expected))


def test_a_model_with_other_heads_through_generate() -> None:
    model = model_of("llama", num_key_value_heads=4)
    with pytest.raises(ShapeError, match="KV heads"):
        model.generate(tokens(9), past_key_values=compressed_cache("llama"), max_new_tokens=2)


def test_a_fingerprint_mismatch() -> None:
    preset = preset_of("llama")
    for other in (
        model_of("qwen2"),
        model_of("llama", num_hidden_layers=3),
        model_of("llama", intermediate_size=112),
    ):
        with pytest.raises(PresetError, match="tiny llama") as caught:
            CompressedDynamicCache.from_preset(preset, model=other, uncompressed_tail=0)
        assert "fingerprint" in str(caught.value)
    CompressedDynamicCache.from_preset(preset, model=model_of("llama"), uncompressed_tail=0)
    CompressedDynamicCache.from_preset(
        preset, model=model_of("llama", seed=5), uncompressed_tail=0
    )  # fine-tuned, say
    CompressedDynamicCache.from_preset(
        preset, model=model_of("llama", vocab_size=160), uncompressed_tail=0
    )  # with more tokens


def test_a_model_with_more_layers_than_the_cache() -> None:
    model = model_of("llama", num_hidden_layers=3)
    for cache in (compressed_cache("llama"), identity_cache(model_of("llama"))):
        with pytest.raises(ShapeError, match=r"layer 2, this cache was made for 2 layers"):
            model.generate(tokens(9), past_key_values=cache, max_new_tokens=2)


# Files.


def _preset_bytes(extension: str) -> bytes:
    native = preset_of("llama", 4.0).native
    return native.to_json().encode() if extension == "json" else bytes(native.to_safetensors())


@pytest.mark.parametrize("extension", ["json", "safetensors"])
def test_truncated_files(tmp_path: Path, extension: str) -> None:
    whole = _preset_bytes(extension)
    path = tmp_path / f"p.{extension}"
    for part in [0, 1, 7, 8, 9, 50, *(len(whole) * i // 23 for i in range(1, 23)), len(whole) - 2]:
        path.write_bytes(whole[:part])
        with pytest.raises(PresetError) as caught:
            load_preset_cache(path, 2, "cpu")
        assert len(str(caught.value)) > 20
    path.write_bytes(whole)
    load_preset_cache(path, 2, "cpu")
    if extension == "safetensors":
        path.write_bytes(whole + b"\0")
        with pytest.raises(PresetError):
            load_preset_cache(path, 2, "cpu")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path, tmp_path / "no" / "no.safetensors"):
        with pytest.raises(PresetError) as caught:
            load_preset_cache(str(path), 2, "cpu")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"[]", b"{}", b"null", b"\xff\xfe\x00", b"PK\x03\x04", b"{" * 5000, b'{"model": ' + b"[" * 5000],
    ids=["empty", "text", "list", "object", "null", "utf16", "zip", "deep", "deep_list"],
)  # fmt: skip
def test_files_that_are_no_presets(tmp_path: Path, content: bytes) -> None:
    for extension in ("json", "safetensors"):
        path = tmp_path / f"p.{extension}"
        path.write_bytes(content)
        with pytest.raises(PresetError):
            Preset.load(path)


def _set(content: dict[str, Any], keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    if value is ...:
        del content[keys[-1]]
    else:
        content[keys[-1]] = value


U = ("layers", 1, "V", "U")
MEAN = ("layers", 1, "V", "mean")


@pytest.mark.parametrize(
    ("keys", "value", "mentions"),
    [
        (("model",), ..., ["model"]),
        (("model",), 3, ["string"]),
        (("rank",), ..., ["rank"]),
        (("rank",), 0, ["rank", "0"]),
        (("rank",), 17, ["rank", "17"]),
        (("rank",), 11, ["U", "11", "12"]),
        (("rank",), -1, ["-1"]),
        (("rank",), "12", ["string"]),
        (("rank",), 12.5, ["12.5"]),
        (("head_dim",), 0, ["head_dim", "0"]),
        (("head_dim",), 32, ["32", "16"]),
        (("head_dim",), 10**15, ["head_dim"]),
        (("n_layers",), 3, ["layers", "3", "2"]),
        (("n_layers",), 0, ["n_layers", "0"]),
        (("n_heads",), 0, ["n_heads", "0"]),
        (("compression_ratio",), -1.0, ["compression_ratio", "-1"]),
        (("layers",), ..., ["layers"]),
        (("layers",), [], ["0", "2"]),
        (("layers",), {}, ["list"]),
        (U, ..., ["layers[1].V.U"]),
        (U, [], ["layer 1", "V", "U"]),
        (U, [1.0, 2.0], ["list"]),
        (U, [[0.1] * 12] * 15, ["layer 1", "U", "15", "16"]),
        (U, [[0.1] * 11] * 16, ["layer 1", "U", "11", "12"]),
        (U, [[0.1] * 12] * 15 + [[0.1] * 3], ["layer 1", "U", "3"]),
        (U, [[0.25] * 12] * 16, ["layer 1", "orthonormal"]),
        ((*U, 2, 3), math.nan, []),
        ((*U, 2, 3), math.inf, []),
        ((*U, 2, 3), None, ["layer 1", "V", "U", "null"]),
        ((*U, 2, 3), "0.1", ["string"]),
        (MEAN, ..., ["layers[1].V.mean"]),
        (MEAN, [0.0] * 15, ["layer 1", "mean", "15", "16"]),
        ((*MEAN, 4), None, ["layer 1", "V", "mean", "null"]),
        ((*MEAN, 4), math.nan, []),
        ((*MEAN, 4), 1e300, []),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_malformed_seed_json(tmp_path: Path, keys: tuple[Any, ...], value: Any, mentions: list[str]) -> None:
    content = seed_preset(2, 4, 16, 12)
    _set(content, keys, value)
    path = write_json(tmp_path / "p.json", content)
    with pytest.raises(PresetError) as caught:
        load_preset_cache(path, 2, "cpu")
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "mentions"),
    [
        (("format_version",), 5, ["format version 5", "upgrade"]),
        (("format_version",), ..., ["format_version"]),
        (("n_kv_heads",), 3, ["n_kv_heads", "3"]),
        (("block_len",), 24, ["block_len", "24"]),
        (("n_sinks",), -1, ["-1"]),
        (("n_sinks",), 10**9, ["n_sinks"]),
        (("bits_per_value",), -2.0, ["bits_per_value", "-2"]),
        (("fingerprint",), "abc", ["fingerprint"]),
        (("rope", 0, "rotary_dim"), 32, ["rotary_dim", "32"]),
        (("rope", 0, "rotary_dim"), 7, ["rotary_dim", "7"]),
        (("rope", 0, "inv_freq"), [1.0], ["inv_freq"]),
        (("rope", 0, "inv_freq", 0), -1.0, ["inv_freq"]),
        (("rope", 0, "pairing"), "spiral", ["spiral"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_malformed_parts_of_ours(
    tmp_path: Path, keys: tuple[Any, ...], value: Any, mentions: list[str]
) -> None:
    content = json.loads(_preset_bytes("json"))
    _set(content["kvlathe"], keys, value)
    with pytest.raises(PresetError) as caught:
        Preset.load(write_json(tmp_path / "p.json", content))
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("widths", 3), 5),
        (("widths", 3), 256),
        (("widths",), [8] * 15),
        (("mean", 0), None),
        (("basis", 2, 2), None),
        (("basis",), [[0.0] * 16] * 16),
        (("importance", 0), -1.0),
        (("importance",), ...),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_malformed_streams(tmp_path: Path, keys: tuple[Any, ...], value: Any) -> None:
    content = json.loads(_preset_bytes("json"))
    _set(content["layers"][1]["K"]["streams"][0], keys, value)
    with pytest.raises(KvlatheError):
        load_preset_cache(write_json(tmp_path / "p.json", content), 2, "cpu")


def test_a_layer_that_refers_to_no_rotation(tmp_path: Path) -> None:
    content = json.loads(_preset_bytes("json"))
    content["layers"][0]["rope"] = 7
    with pytest.raises(PresetError, match="7"):
        Preset.load(write_json(tmp_path / "p.json", content))


def test_a_file_name_without_a_format(tmp_path: Path) -> None:
    for name in ("preset", "preset.bin"):
        with pytest.raises(PresetError, match=r"\.safetensors"):
            preset_of("llama").save(tmp_path / name)
    with pytest.raises(PresetError):
        preset_of("llama").save(tmp_path / "no" / "preset.json")


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(PresetError):
        NativePreset.from_bytes(content)


@given(
    extension=st.sampled_from(["json", "safetensors"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6),
    header_only=st.booleans(),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_damaged_files_never_panic(
    extension: str, edits: list[tuple[float, bytes]], header_only: bool
) -> None:
    """Overwritten bytes: read as some other preset or refused, and whatever was read can be used or is refused."""
    content = bytearray(_damaged_source(extension))
    span = 2000 if header_only else len(content) - 10
    for place, patch in edits:
        at = int(place * span)
        content[at : at + len(patch)] = patch
    try:
        preset = Preset(NativePreset.from_bytes(bytes(content)))
        for side in ("key", "value"):
            codec = preset.codec(0, side)  # type: ignore[arg-type]
            assert codec is not None or preset.is_seed_style
        CompressedDynamicCache.from_preset(preset, uncompressed_tail=0).update(*random_kv(20), 0)
    except KvlatheError:
        pass


_SOURCES: dict[str, bytes] = {}


def _damaged_source(extension: str) -> bytes:
    if extension not in _SOURCES:
        _SOURCES[extension] = _preset_bytes(extension)
    return _SOURCES[extension]


def test_rates_out_of_range() -> None:
    preset = preset_of("llama")
    for bits in (-1.0, 0.5, math.nan, 9.5, math.inf):
        with pytest.raises((BudgetError, CalibrationError)) as caught:
            preset.with_bits(bits)
        assert isinstance(caught.value, KvlatheError)


def test_a_seed_preset_has_no_other_rates(tmp_path: Path) -> None:
    preset = Preset.load(write_json(tmp_path / "p.json", seed_preset(2, 4, 16, 12)))
    with pytest.raises(PresetError, match="tests/tiny"):
        preset.with_bits(4.0)


def test_layers_and_sides_that_do_not_exist() -> None:
    preset = preset_of("llama")
    with pytest.raises(ShapeError, match=r"layer 2 does not exist, the preset has 2"):
        preset.codec(2, "key")
    with pytest.raises(ShapeError, match="both"):
        preset.codec(0, "both")  # type: ignore[arg-type]


# The seed's compressor.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_basis_that_is_not_finite(bad: float) -> None:
    u, mean = orthonormal(16, 12), torch.zeros(16)
    broken = u.clone()
    broken[3, 4] = bad
    with pytest.raises(NonFiniteError, match="U"):
        QuantizedCalibratedCompressor(broken, mean)
    mean[5] = bad
    with pytest.raises(NonFiniteError, match="mean"):
        QuantizedCalibratedCompressor(u, mean)


@pytest.mark.parametrize(
    "u",
    [
        torch.ones(16, 4) / 4,
        orthonormal(16, 12) * 1.001,
        torch.zeros(16, 4),
        torch.randn(16, 4, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["equal", "scaled", "zero", "random"],
)
def test_a_basis_that_is_not_orthonormal(u: Tensor) -> None:
    with pytest.raises(PresetError, match=r"orthonormal.*torch\.linalg\.qr"):
        QuantizedCalibratedCompressor(u, torch.zeros(16))


@pytest.mark.parametrize(
    ("u", "mean", "mentions"),
    [
        (torch.eye(16), torch.zeros(15), ["[16, 16]", "[15]"]),
        (torch.eye(16)[:8], torch.zeros(8), ["rank 16", "8"]),
        (torch.zeros(16, 0), torch.zeros(16), ["rank 0", "16"]),
        (torch.zeros(16), torch.zeros(16), ["[16]", "[head_dim, rank]"]),
        (torch.eye(16)[None], torch.zeros(16), ["[1, 16, 16]"]),
        (torch.eye(16), torch.zeros(16, 1), ["[16, 1]"]),
    ],
)
def test_a_basis_of_the_wrong_shape(u: Tensor, mean: Tensor, mentions: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        QuantizedCalibratedCompressor(u, mean)
    for mention in mentions:
        assert mention in str(caught.value)


@pytest.mark.parametrize("bits", [4, 0, -8, 32, 7])
def test_other_bits(bits: int) -> None:
    with pytest.raises(ShapeError, match=rf"bits is {bits}, expected 8 .*16"):
        QuantizedCalibratedCompressor(torch.eye(16), torch.zeros(16), bits=bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_dtype_to_expand_to_that_is_no_float(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=str(dtype)):
        QuantizedCalibratedCompressor(torch.eye(16), torch.zeros(16), dtype=dtype)


def test_a_basis_on_two_devices() -> None:
    for u_device, mean_device in (("meta", "cpu"), ("cpu", "meta"), ("meta", "meta")):
        with pytest.raises(DeviceError, match="meta"):
            QuantizedCalibratedCompressor(torch.eye(16).to(u_device), torch.zeros(16).to(mean_device))


def test_vectors_of_another_head_dim() -> None:
    with pytest.raises(ShapeError, match=r"32.*16"):
        low_rank().compress(torch.zeros(1, 2, 3, 32))


# What comes in later.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("kind", CODED, indirect=True)
def test_numbers_that_cannot_be_coded(
    filled: CompressedDynamicCache, kind: str, which: int, bad: float
) -> None:
    states = [*random_kv(3, batch=2, seed=1)]
    states[which][1, 1, 2, 5] = bad
    if which == 0 and kind == "values_only":
        filled.update(*states, 0)  # an exact side takes what the stock cache takes
        assert filled.get_seq_length() == 43
        return
    name = ("key", "value")[which]
    _refuses(filled, *states, NonFiniteError, name)
    filled.update(*random_kv(3, batch=2, seed=2), 0)
    assert filled.get_seq_length() == 43


@pytest.mark.parametrize("kind", CODED, indirect=True)
def test_numbers_that_cannot_be_coded_in_the_first_call(kind: str) -> None:
    cache = CACHES[kind]()
    keys, values = random_kv(20)
    values[0, 0, 0, 0] = math.nan
    _refuses(cache, keys, values, NonFiniteError, "value")
    cache.update(*random_kv(5, batch=3, heads=2), 0)
    assert cache.get_seq_length() == 5


def test_exact_sides_take_any_number() -> None:
    cache = CACHES["identity"]()
    keys, values = random_kv(5)
    keys[0, 0, 0, 0] = math.nan
    cache.update(keys, values, 0)
    assert torch.equal(cache.layers[0].keys, keys) or cache.layers[0].keys.isnan().any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_states_that_are_no_floats(kind: str, dtype: torch.dtype) -> None:
    states = torch.ones(1, 2, 12, 16, dtype=dtype)
    _refuses(CACHES[kind](), states, states, DtypeError, str(dtype))


@pytest.mark.parametrize("kind", ["native_streams", "torch_streams"], indirect=True)
def test_float64_and_the_calibrated_codec(kind: str) -> None:
    keys, values = random_kv(3, dtype=torch.float64)
    _refuses(CACHES[kind](), keys, values, DtypeError, "float64", "float32")


@pytest.mark.parametrize("kind", ["native_low_rank", "identity", "user"], indirect=True)
def test_float64_and_the_others(kind: str) -> None:
    cache = CACHES[kind]()
    keys, values = random_kv(100, dtype=torch.float64)
    cache.update(keys, values, 0)
    assert cache.layers[0].keys.dtype == torch.float64
    assert cache.layers[0].keys.shape == keys.shape


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size(filled: CompressedDynamicCache, batch: int) -> None:
    _refuses(filled, *random_kv(1, batch=batch), ShapeError, f"batch size is {batch}", "2", "reset()")


@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 16), (2, 1), (2, 8), (2, 32)])
def test_other_heads_later(filled: CompressedDynamicCache, heads: int, dim: int) -> None:
    """One head or one component would even broadcast."""
    _refuses(filled, *random_kv(1, batch=2, heads=heads, dim=dim), ShapeError, str(heads), str(dim))


def test_another_dtype_later(filled: CompressedDynamicCache) -> None:
    states = random_kv(1, batch=2, dtype=torch.bfloat16)
    _refuses(filled, *states, DtypeError, "float32", "bfloat16")


def test_another_device_later(filled: CompressedDynamicCache) -> None:
    keys, values = random_kv(1, batch=2)
    _refuses(filled, keys.to("meta"), values.to("meta"), DeviceError, "cpu", "meta")
    _refuses(filled, keys, values.to("meta"), DeviceError, "cpu", "meta")
    _refuses(filled, keys.to("meta"), values, DeviceError, "cpu", "meta")


def test_another_device_than_the_preset_was_loaded_for() -> None:
    cache = CompressedDynamicCache.from_preset(preset_of("llama"), device="cpu", uncompressed_tail=0)
    _refuses(cache, *(t.to("meta") for t in random_kv(3)), DeviceError, "cpu", "meta")


def test_keys_and_values_that_do_not_match(filled: CompressedDynamicCache) -> None:
    keys, values = random_kv(3, batch=2)
    _refuses(filled, keys, values[:, :, :2], ShapeError, "[2, 2, 3, 16]", "[2, 2, 2, 16]")
    _refuses(filled, keys[:1], values, ShapeError, "[1, 2, 3, 16]", "[2, 2, 3, 16]")
    _refuses(filled, keys, values.half(), DtypeError, "float32", "float16")
    _refuses(filled, keys[0], values[0], ShapeError, "[2, 3, 16]", "[batch, heads, tokens, head_dim]")


def test_a_layer_that_does_not_exist(filled: CompressedDynamicCache) -> None:
    _refuses(filled, *random_kv(1, batch=2), ShapeError, "layer 1", "1 layers", layer=1)


@pytest.mark.parametrize(
    "settings_",
    [
        {"compress_start_len": -1},
        {"uncompressed_tail": -5},
        {"num_layers": 0},
        {"num_layers": -1},
        {"uncompressed_tail": 1.5},
        {"compress_start_len": "64"},
        {"uncompressed_tail": None},
        {"uncompressed_tail": True},
    ],
    ids=str,
)
def test_lengths_that_are_no_lengths(settings_: dict[str, Any]) -> None:
    (name, value), *_ = settings_.items()
    arguments = {"k_compressors": [low_rank()], "v_compressors": [low_rank()], "num_layers": 1, **settings_}
    with pytest.raises(ShapeError) as caught:
        CompressedDynamicCache(**arguments)
    assert f"{name} is {value!r}" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("name", ["compress_after", "keep_recent"])
def test_negative_lengths_through_the_loader(tmp_path: Path, name: str) -> None:
    path = write_json(tmp_path / "p.json", seed_preset(2, 4, 16, 12))
    with pytest.raises(ShapeError, match="-3"):
        load_preset_cache(path, 2, "cpu", adaptive=True, **{name: -3})


@pytest.mark.parametrize(
    "compressor", [None, 3, nn.Linear(2, 2), object()], ids=["None", "int", "Linear", "object"]
)
def test_things_that_are_no_compressors(compressor: Any) -> None:
    with pytest.raises(PresetError, match=rf"v_compressors\[1\].*{type(compressor).__name__}.*compress\(\)"):
        CompressedDynamicCache([low_rank()] * 2, [low_rank(), compressor], 2)


@pytest.mark.parametrize("n", [1, 30, 400])
def test_a_positive_crop(filled: CompressedDynamicCache, n: int) -> None:
    before = _snapshot(filled)
    with pytest.raises(ShapeError, match=rf"crop\({n}\).*negative"):
        filled.crop(n)
    _assert_unchanged(filled, before)


@pytest.mark.parametrize("rows", [[2], [-3], [0, 5]])
def test_rows_that_do_not_exist(filled: CompressedDynamicCache, rows: list[int]) -> None:
    before = _snapshot(filled)
    with pytest.raises(ShapeError, match=r"rows \[.*the cache holds 2"):
        filled.reorder_cache(torch.tensor(rows))
    _assert_unchanged(filled, before)


def test_no_rows_at_all(filled: CompressedDynamicCache) -> None:
    before = _snapshot(filled)
    for select in (
        lambda: filled.batch_select_indices(torch.tensor([], dtype=torch.long)),
        lambda: filled.batch_repeat_interleave(0),
    ):
        with pytest.raises(ShapeError):
            select()
    _assert_unchanged(filled, before)


def test_assigning_keys(filled: CompressedDynamicCache) -> None:
    with pytest.raises(ShapeError, match=r"update\(\)"):
        filled.layers[0].keys = torch.zeros(1)
    with pytest.raises(ShapeError, match=r"update\(\)"):
        filled.layers[0].values = torch.zeros(1)


def test_an_error_in_a_users_compressor_is_the_users(filled: CompressedDynamicCache) -> None:
    class Broken(Tagged):
        def compress(self, x: Tensor) -> Tensor:
            raise RuntimeError("mine")

    cache = one_layer_cache(IdentityCompressor(), Broken())
    with pytest.raises(RuntimeError, match="mine"):
        cache.update(*random_kv(64), 0)


def test_errors_survive_a_copied_cache(filled: CompressedDynamicCache) -> None:
    twin = copy.deepcopy(filled)
    _refuses(twin, *random_kv(1, batch=5), ShapeError, "batch size is 5")
    assert torch.equal(twin.layers[0].keys, filled.layers[0].keys)
    assert torch.equal(twin.layers[0].values, filled.layers[0].values)
