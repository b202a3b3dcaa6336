"""A cache as a file, and a file as a cache: `docs/container_format.md`.

The bytes are the native module's business (`kvlathe-prefix`); here is what of a `CompressedDynamicCache` goes into
them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._native import Container, MappedBytes, PackedRow, version, write_container
from ..compressors import StreamSetCompressor
from ..errors import CacheStateError, ContainerError, ModelError, PresetError, ShapeError
from ..given_model import transformers_model
from ..model_identity import model_identity
from ..preset import Preset, Side, loaded_preset
from ..stores import BlockRow, LayerParts, SideParts
from ..stores.block import memory_of, native_row
from .layer import CompressedLayer
from .mixed_layer import CompressedMixedLayer
from .padding import Padding

SIDES: tuple[Side, Side] = ("key", "value")

# What the file says, with whatever keys a later writer may add.
Header = dict[str, Any]
# What native code writes of a side: the bytes of its sinks, its rows' blocks, the bytes of its tail.
SideContents = tuple[Tensor, list[PackedRow], Tensor]


def write_cache(
    layers: Sequence[Any],
    path: str | os.PathLike[str],
    token_ids: Tensor | Sequence[Any] | None,
    weights: str,
) -> None:
    """See `CompressedDynamicCache.save`.

    Args:
        weights: what `model_identity` says, or "".
    """
    check_portable(layers)
    n_tokens, batch = held_by_all(layers)
    preset = preset_of(layers)
    ids = None if token_ids is None else ids_of(token_ids, batch, n_tokens)
    filled = [layer for layer in layers if layer.get_seq_length()]
    parts = [layer.export_parts() for layer in filled]
    shapes = iter([layer_shape(*each) for each in zip(filled, parts, strict=True)])
    policy = layers[0].policy
    header = {
        **origin(preset, weights),
        "n_tokens": n_tokens,
        "batch": batch,
        "has_token_ids": ids is not None,
        "compress_start_len": policy.compress_start_len,
        "uncompressed_tail": policy.n_tail,
        "record_past": filled[0].record_past,
        "layers": [next(shapes) if layer.get_seq_length() else None for layer in layers],
    }
    contents = [(side_contents(each.key), side_contents(each.value)) for each in parts]
    write_container(os.fspath(path), json.dumps(header), ids, contents)


def origin(preset: Preset, weights: str) -> Header:
    """What a file says of whose keys and values it holds."""
    return {
        "library_version": version(),
        "model": preset.meta["model"],
        "preset": preset.digest,
        "fingerprint": preset.meta["kvlathe"]["cache_fingerprint"],
        "weights": weights,
        "block_len": preset.block_len,
    }


def held_by_all(layers: Sequence[CompressedLayer]) -> tuple[int, int]:
    """Tokens, and sequences that have them, in all layers but those that a model leaves out.

    Raises:
        CacheStateError: layers that are unlike, or none that holds anything.
    """
    held = {layer.held for layer in layers if layer.get_seq_length()}
    if len(held) == 1:
        return held.pop()
    unlike = (
        "are unlike, as a pass through the model was cut short; crop(0) or reset()"
        if held
        else "hold nothing; a cache that holds nothing is not saved"
    )
    raise CacheStateError(f"the layers of this cache {unlike}")


def check_portable(layers: Sequence[Any]) -> None:
    """Refuse layers that hold anything else than keys and values of ours.

    Raises:
        ModelError: there are some.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer, CompressedLayer):
            what = f"is transformers' own ({type(layer).__name__})"
        elif isinstance(layer, CompressedMixedLayer):
            what = "keeps a state of linear attention or of a convolution beside its keys and values"
        else:
            continue
        raise ModelError(
            f"layer {index} {what}, and files have a place for keys and values of ours only; torch.save writes such a "
            f"cache, torch.load(path) reads it"
        )


def preset_of(layers: Sequence[CompressedLayer]) -> Preset:
    """The one preset whose codecs all layers have.

    Raises:
        PresetError: there is none.
    """
    first = layers[0].compressor("key")
    preset = getattr(first, "preset", None) if isinstance(first, StreamSetCompressor) else None
    digest = preset.digest if isinstance(preset, Preset) else None
    for index, layer in enumerate(layers):
        for side in SIDES:
            compressor = layer.compressor(side)
            name = compressor.native.id if isinstance(compressor, StreamSetCompressor) else None
            sinks = preset.n_sinks if preset is not None else None
            if digest is None or name != (digest, index, side) or layer.policy.n_sinks != sinks:
                raise PresetError(
                    f"{side}s of layer {index} are not coded as a calibrated preset's: only caches of one preset, made "
                    f"by CompressedDynamicCache.from_preset or load_preset_cache, are saved as files; torch.save "
                    f"writes others"
                )
    assert isinstance(preset, Preset)
    return preset


def ids_of(token_ids: Tensor | Sequence[Any], batch: int, n_tokens: int) -> list[int]:
    """The ids of the tokens that are held, row by row.

    Raises:
        ShapeError: those of another cache.
    """
    ids = whole_numbers(token_ids)
    if ids is None or ids.shape[0] != batch or ids.shape[1] < n_tokens:
        given = torch.as_tensor(token_ids)
        raise ShapeError(
            f"token_ids are {given.dtype} {list(given.shape)}, but the cache holds {n_tokens} tokens of {batch} rows; "
            f"give the ids that the model was given, [{batch}, {n_tokens}]; more behind them are left out"
        )
    ids = ids[:, :n_tokens]
    check_range(ids)
    flat: list[int] = ids.reshape(-1).tolist()
    return flat


def whole_numbers(token_ids: Tensor | Sequence[Any]) -> Tensor | None:
    """Ids as [B, T] on the CPU, one sequence being a batch of one; None for what is none."""
    ids = torch.as_tensor(token_ids).detach().cpu()
    ids = ids[None] if ids.dim() == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    return ids if ids.dim() == 2 and whole else None


def check_range(ids: Tensor) -> None:
    """Refuse what does not fit into the four bytes that a file has for an id.

    Raises:
        ShapeError
    """
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= 2**32:
        raise ShapeError(f"token_ids range from {least} to {most}, expected 0 to 2^32 - 1")


def layer_shape(layer: CompressedLayer, parts: LayerParts) -> Header:
    """What the header says of a layer."""
    padding = layer.padding
    shape: Header = {
        "n_heads": parts.key.tail.shape[1],
        "dtype": _name(layer.form.dtype),
        "model_dtypes": [_name(dtype) for dtype in layer.form.dtypes],
        "n_sinks": layer.policy.n_sinks,
        "window": layer.policy.window,
        "padding": None if padding is None else list(padding.lengths),
    }
    for side in SIDES:
        of_side: SideParts = getattr(parts, side)
        compressor = layer.compressor(side)
        assert isinstance(compressor, StreamSetCompressor)  # as `preset_of` has found
        shape[side] = {
            "head_dim": of_side.tail.shape[3],
            "first": of_side.first,
            "n_sinks": of_side.sinks.shape[2],
            "n_blocks": len(of_side.blocks[0]),
            "block_bytes": compressor.native.block_bytes,
            "n_tail": of_side.tail.shape[2],
        }
    return shape


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def side_contents(parts: SideParts) -> SideContents:
    """A side as `write_container` and `NativePrefixStore.put` take it."""
    sinks, tail = (
        each.detach().cpu().contiguous().view(-1).view(torch.uint8) for each in (parts.sinks, parts.tail)
    )
    return sinks, [native_row(row) for row in parts.blocks], tail


class SavedCache:
    """A file that has been opened, mapped and checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.native = Container.open(os.fspath(path))
        self.header: Header = json.loads(self.native.header_json())

    def preset(self, given: Preset | None) -> Preset:
        """The preset whose codecs read the blocks: the one given, or one that this process holds.

        Raises:
            PresetError: another one, or none.
        """
        digest: str = self.header["preset"]
        if given is None:
            return loaded_preset(digest)
        if given.digest != digest:
            raise PresetError(
                f"this cache was packed with the preset of the digest {digest[:12]}… (of {self.header['model']!r}), "
                f"and {given!r} has {str(given.digest)[:12]}…; give the preset that packed it, at the same rate"
            )
        return given

    def check_model(self, preset: Preset, model: nn.Module) -> None:
        """Refuse a model whose cache this is not.

        Raises:
            PresetError: one of another config.
            ModelError: one of other weights.
        """
        preset.check_model(transformers_model(model).config)
        weights = self.header["weights"]
        if weights and weights != model_identity(model):
            raise ModelError(
                f"this cache was computed with other weights than those of the {type(model).__name__} given, though "
                f"configs agree: another fine-tune, another number format, or other adapters; load the model that "
                f"wrote it"
            )

    def token_ids(self) -> Tensor | None:
        """[batch, n_tokens], int64."""
        ids = self.native.token_ids()
        return None if ids is None else torch.tensor(ids).view(self.header["batch"], -1)

    def fill(self, layers: list[Any], device: torch.device) -> None:
        """Fill a new cache's layers, which go on as those that were saved.

        Raises:
            ContainerError: a file whose numbers do not fit the preset.
        """
        shapes = self.header["layers"]
        if len(shapes) != len(layers):
            raise ContainerError(f"the file has {len(shapes)} layers, its preset {len(layers)}")
        for index, shape in enumerate(shapes):
            # As it was saved: a cache that was made without a config has no windows.
            window = None if shape is None else shape["window"]
            held = layers[index]
            policy = replace(held.policy, window=window)
            layer = CompressedLayer(held.compressor("key"), held.compressor("value"), policy, device)
            layers[index] = layer
            if shape is None:
                continue
            if policy.n_sinks != shape["n_sinks"]:
                raise ContainerError(
                    f"layer {index} of the file has {shape['n_sinks']} sinks, its preset {policy.n_sinks}"
                )
            parts = (side_parts(self.native, self.header, index, side, device) for side in SIDES)
            layer.import_parts(LayerParts(*parts))
            restore_form(layer, shape)
            self._restore(layer, shape)

    def _restore(self, layer: CompressedLayer, shape: Header) -> None:
        """What a layer knows beside its tokens."""
        layer.record_past = bool(self.header["record_past"])
        if shape["padding"] is not None and layer.policy.n_sinks and not layer.is_sliding:
            layer.padding = Padding(shape["padding"], layer.policy.n_sinks)


def restore_form(layer: CompressedLayer, shape: Header) -> None:
    """The dtypes in which the model hands over what the layer holds, which differ under autocast."""
    dtypes = tuple(getattr(torch, name) for name in shape["model_dtypes"])
    layer.form = replace(layer.form, dtypes=(dtypes[0], dtypes[1]))


def side_parts(native: Container, header: Header, layer: int, side: Side, device: torch.device) -> SideParts:
    """One side of one layer as a file holds it. Exact tokens are copied, as a tensor of torch's invites to write to
    it; blocks stay where they are.
    """
    shape, batch = header["layers"][layer], header["batch"]
    of_side, dtype = shape[side], getattr(torch, shape["dtype"])

    def exact(memory: MappedBytes, n_tokens: int) -> Tensor:
        sizes = (batch, shape["n_heads"], n_tokens, of_side["head_dim"])
        return memory_of(memory).view(dtype).view(sizes).clone().to(device)

    sinks, tail = native.exact(layer, side)
    rows = [BlockRow(native.blocks(layer, side, row)) for row in range(batch)]
    return SideParts(of_side["first"], exact(sinks, of_side["n_sinks"]), rows, exact(tail, of_side["n_tail"]))
