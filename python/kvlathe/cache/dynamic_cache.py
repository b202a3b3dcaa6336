"""`CompressedDynamicCache` and `load_preset_cache`: the seed API's entry points."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compressors import IdentityCompressor
from ..devices import available_device
from ..errors import CacheStateError, ModelError, PresetError, RollbackError, ShapeError
from ..preset import Preset, Side, warn_if_unverified
from ..preset_compressors import preset_compressor
from .layer import CompressedLayer
from .layer_kinds import LayerKind, holds_recurrent_state, layer_kinds
from .layer_store import Policy
from .memory_stats import memory_stats
from .padding import PaddedRows
from .passes import Pass, Passes
from .recurrent_states import RecurrentStates
from .window import WindowLayer


class CompressedDynamicCache(RecurrentStates):
    """A `DynamicCache` that holds keys and values compressed.

    The first tokens that the compressors want exact (4 with our presets) and the last ``uncompressed_tail`` tokens
    stay as the model gave them; the rest is coded, in whole blocks, once the sequence is longer than
    ``compress_start_len``.

    Args:
        k_compressors: one compressor of keys a layer: `IdentityCompressor`, `QuantizedCalibratedCompressor`,
            `StreamSetCompressor`, or any module with ``compress(x)`` and ``expand(coded)``.
        v_compressors: the same for values.
        num_layers: the model's number of layers.
        compress_start_len: sequences up to this many tokens are not coded at all.
        uncompressed_tail: this many latest tokens stay exact; up to a block less one more do.
        config: the model's. With it every layer is served as its kind of attention wants: those with a sliding
            window hold their window only, and those that keep something else than keys and values keep it as
            they do in ``DynamicCache(config=config)``, uncompressed. Without it every layer holds all tokens.

    Raises:
        ShapeError: lists of another length than ``num_layers``, negative lengths, a config of another number of layers.
        PresetError: a compressor without ``compress`` or ``expand``.
        ModelError: a config with layers for which transformers has no growing cache.

    Example:
        >>> cache = CompressedDynamicCache([IdentityCompressor()] * 2, [IdentityCompressor()] * 2, num_layers=2)
        >>> cache.get_seq_length()
        0
    """

    def __init__(
        self,
        k_compressors: Sequence[nn.Module],
        v_compressors: Sequence[nn.Module],
        num_layers: int,
        compress_start_len: int = 0,
        uncompressed_tail: int = 0,
        *,
        config: PreTrainedConfig | None = None,
    ) -> None:
        self._build(
            k_compressors, v_compressors, num_layers, compress_start_len, uncompressed_tail, config, None
        )

    def _build(
        self,
        k_compressors: Sequence[nn.Module],
        v_compressors: Sequence[nn.Module],
        num_layers: int,
        compress_start_len: int,
        uncompressed_tail: int,
        config: PreTrainedConfig | None,
        device: torch.device | None,
    ) -> None:
        for name, given in (
            ("num_layers", num_layers),
            ("compress_start_len", compress_start_len),
            ("uncompressed_tail", uncompressed_tail),
        ):
            if not isinstance(given, int) or isinstance(given, bool) or given < (name == "num_layers"):
                least = 1 if name == "num_layers" else 0
                raise ShapeError(f"{name} is {given!r}, expected a whole number, at least {least}")
        for name, compressors in (("k_compressors", k_compressors), ("v_compressors", v_compressors)):
            if len(compressors) != num_layers:
                raise ShapeError(
                    f"{name} has {len(compressors)} entries for num_layers={num_layers}; one a layer is needed"
                )
            for layer, compressor in enumerate(compressors):
                if not (
                    callable(getattr(compressor, "compress", None))
                    and callable(getattr(compressor, "expand", None))
                ):
                    raise PresetError(
                        f"{name}[{layer}] is a {type(compressor).__name__} without compress() and expand()"
                    )
        kinds = [LayerKind()] * num_layers if config is None else layer_kinds(config, num_layers)
        layers: list[Any] = []
        for kind, k_compressor, v_compressor in zip(kinds, k_compressors, v_compressors, strict=True):
            n_sinks = max(int(getattr(c, "n_sinks", 0)) for c in (k_compressor, v_compressor))
            policy = Policy(n_sinks, compress_start_len, uncompressed_tail)
            if kind.stock is not None:
                layers.append(kind.stock)
            elif kind.sliding_window is not None:
                layers.append(WindowLayer(k_compressor, v_compressor, policy, kind.sliding_window, device))
            else:
                layers.append(CompressedLayer(k_compressor, v_compressor, policy, device))
        super().__init__()
        # A fixed list of layers instead of one class to replicate: a model with more layers must not go on unnoticed.
        self.layers = layers
        self.layer_class_to_replicate = None
        self.compress_start_len = compress_start_len
        self.uncompressed_tail = uncompressed_tail
        self._passes = Passes()

    @classmethod
    def from_preset(
        cls,
        preset: Preset,
        *,
        model: PreTrainedModel | None = None,
        compress_start_len: int = 0,
        uncompressed_tail: int = 0,
        device: str | torch.device | None = None,
    ) -> CompressedDynamicCache:
        """A cache with a preset's codecs.

        Args:
            model: checks that the preset is this model's, and gives the cache the model's config (see above).

        Raises:
            PresetError: a preset that was calibrated for another model.
            DeviceError: a device that this machine lacks.
        """
        config = model.config if model is not None else None
        cache = cls._from_preset(preset, config, compress_start_len, uncompressed_tail, device)
        if model is not None:
            warn_if_unverified(preset)
        return cache

    @classmethod
    def _from_preset(
        cls,
        preset: Preset,
        config: PreTrainedConfig | None,
        compress_start_len: int,
        uncompressed_tail: int,
        device: str | torch.device | None,
    ) -> CompressedDynamicCache:
        if config is not None:
            preset.check_model(config)
        k_compressors = [preset_compressor(preset, layer, "key") for layer in range(preset.n_layers)]
        v_compressors = [preset_compressor(preset, layer, "value") for layer in range(preset.n_layers)]
        cache = cls.__new__(cls)
        wanted = available_device(device) if device is not None else None
        cache._build(
            k_compressors,
            v_compressors,
            preset.n_layers,
            compress_start_len,
            uncompressed_tail,
            config,
            wanted,
        )
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one layer's new keys and values; see `CompressedLayer.update`.

        Raises:
            ShapeError: a layer beyond ``num_layers``: the cache was made for another model.
            ModelError: a model with cross-attention that was handed this cache for both of its attentions.
            CacheStateError: another thread uses the cache as well.
        """
        if layer_idx >= len(self.layers):
            raise ShapeError(
                f"the model has a layer {layer_idx}, this cache was made for {len(self.layers)} layers; "
                f"pass num_layers=model.config.num_hidden_layers and a preset of this model"
            )
        passes, layer = self._passes, self.layers[layer_idx]
        entered = passes.enter("update()")
        try:
            current = passes.current
            if current is not None:
                self._check_pass(layer_idx, current)
            expanded = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if current is None:
                passes.see(None)
            elif isinstance(layer, CompressedLayer):
                passes.note(current, layer_idx, layer.get_seq_length())
        finally:
            if entered:
                passes.leave()
        return expanded

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """Tell an empty cache that rows of the coming batch begin with padding: their first real tokens stay exact.

        `attach` does it by itself. Call it without `attach`, before the first pass through the model. It serves layers
        of full attention; in a sliding window the first ones of all rows, padding or not, are exact.

        Args:
            attention_mask: [B, tokens], 0 for padding, as a tokenizer gives it.

        Raises:
            ShapeError: a mask of another shape.
            CacheStateError: the cache is not empty.
        """
        if attention_mask.dim() != 2:
            raise ShapeError(
                f"the attention mask has the shape {list(attention_mask.shape)}, expected [batch, tokens]"
            )
        if self.get_seq_length():
            raise CacheStateError("note_padding() comes before the first tokens; reset() empties the cache")
        rows = PaddedRows.of(attention_mask)
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.padding_noted = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; see `DynamicCache`."""
        n_tokens = super().get_seq_length(layer_idx)
        self._passes.see(n_tokens)
        return n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of tokens, and position of the first of them, that `update` will return.

        Raises:
            CacheStateError: another thread is in the middle of a pass through the model, or an earlier pass was cut
                short and left the layers unlike.
        """
        # Models ask for this before their first layer runs.
        self._passes.await_generation(self)
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        # Some models leave layers out, always the same ones.
        held = [layer.held for layer in compressed if layer.get_seq_length()]
        if len(set(held)) > 1:
            tokens, rows = ({states[at] for states in held} for at in range(2))
            unlike = (
                f"{min(tokens)} to {max(tokens)} tokens" if len(tokens) > 1 else f"batches of {sorted(rows)}"
            )
            raise CacheStateError(
                f"layers of this cache hold {unlike}: a pass through the model, or another call, was cut short by an "
                f"exception or mixed up with another thread's; crop(0) removes the tokens of such a pass unless it "
                f"was the cache's first, reset() empties the cache"
            )
        if compressed:
            self._passes.begin(held[0][0] if held else 0, len(compressed))
        for layer in compressed:
            # Announced by a pass that did not come as far.
            layer.attends_next, layer.padding_seen = False, None
        return super().get_mask_sizes(query_length, layer_idx)

    def _check_pass(self, layer_idx: int, current: Pass) -> None:
        """Refuse an update that is not the one which this thread's pass has come to."""
        if layer_idx in current.updated:
            self._passes.end()
            raise ModelError(
                f"layer {layer_idx} updated this cache twice in one forward pass, as encoder-decoder models do, whose "
                f"cross-attention needs a cache of its own: pass past_key_values=EncoderDecoderCache(cache, "
                f"DynamicCache())"
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, CompressedLayer) and layer.get_seq_length() != current.n_tokens:
            held = "has been reset" if current.n_tokens is None else f"held {current.n_tokens}"
            raise CacheStateError(
                f"layer {layer_idx} holds {layer.get_seq_length()} tokens, but the cache {held} when this pass through "
                f"the model began: another thread uses the same cache, or an earlier pass was cut short; give each "
                f"thread a cache of its own, and reset() this one"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; zero or negative, as in transformers 5.

        Where an exception has ended a pass through the model early, its tokens go as well, from the layers that have
        them: `crop(0)` removes nothing else. A cache's very first pass cannot be told from layers that a model leaves
        out: there `reset` does it. Older tokens that such a pass has coded stay coded.

        Raises:
            ShapeError: a positive number.
            RollbackError: a sliding window that would lack tokens, or a recurrent state, which has no way back.
                No layer has been changed.
            CacheStateError: another thread uses the cache as well.
            ResourceError: no memory for the rest of a block that is cut. Layers may have been cropped already; once
                there is memory, crop(0) brings the others into line.
        """
        with self._passes.alone("crop()"):
            lengths = [
                layer.get_seq_length() if isinstance(layer, CompressedLayer) else None
                for layer in self.layers
            ]
            shortest = min((n for n in lengths if n), default=0)
            # Of each layer: also what a pass that was cut short has added to it.
            removed = [tokens_to_remove - (n - shortest if n else 0) for n in lengths]
            for index, layer in enumerate(self.layers):
                if isinstance(layer, CompressedLayer):
                    layer.check_crop(tokens_to_remove if tokens_to_remove > 0 else removed[index])
                elif min(removed) < 0 and holds_recurrent_state(layer):
                    raise RollbackError(
                        f"crop({tokens_to_remove}): layer {index} keeps a recurrent state, from which no token can be "
                        f"removed; copy the cache before tokens that may be removed, or reset() and start again"
                    )
            self._passes.end()
            self._passes.see(None)
            for layer, n_tokens in zip(self.layers, removed, strict=True):
                layer.crop(n_tokens)

    def reset(self) -> None:
        """Empty the cache, for a new sequence. Works in whatever state an exception has left the cache."""
        self._passes = self._passes.after_reset()
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace the batch by these of its rows, in this order; see `DynamicCache`."""
        with self._passes.alone("reorder_cache()"):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `reorder_cache`."""
        with self._passes.alone("batch_select_indices()"):
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch; see `DynamicCache`."""
        with self._passes.alone("batch_repeat_interleave()"):
            super().batch_repeat_interleave(repeats)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedDynamicCache:
        with self._passes.alone("copy.deepcopy()"):
            twin = object.__new__(type(self))
            memo[id(self)] = twin
            for name, value in self.__dict__.items():
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def compressor(self, layer_idx: int, side: Side) -> nn.Module:
        """The compressor of one layer's "key" or "value" side; that of a layer of transformers' own is exact."""
        layer = self.layers[layer_idx]
        return layer.compressor(side) if isinstance(layer, CompressedLayer) else IdentityCompressor()

    def n_sinks(self, layer_idx: int = 0) -> int:
        """First tokens of a sequence that a layer keeps exact."""
        layer = self.layers[layer_idx]
        return layer.policy.n_sinks if isinstance(layer, CompressedLayer) else 0

    def get_memory_stats(self) -> dict[str, int | float]:
        """What the cache holds, in bytes truly allocated for it.

        Returns:
            total_bytes (and total_mb, 2^20 bytes): exact_bytes of sinks, tail and uncoded sides, plus coded_bytes
            of packed blocks with their side information and padding. uncompressed_bytes_equivalent: what `DynamicCache`
            would take, and compression_ratio, their quotient. bits_per_value: total bits over all numbers held.
            compressed_tokens (the most that any layer holds coded) and uncompressed_tokens add up to seq_len.
            window_layers: those that hold their sliding window only. stock_layers: transformers' own, with
            stock_bytes, which are part of exact_bytes and of the equivalent, not of bits_per_value. The codec's own
            tables, which all caches of a preset share, are not counted.
        """
        return {
            **memory_stats(self.layers, self.get_seq_length()),
            "compress_start_len": self.compress_start_len,
            "uncompressed_tail": self.uncompressed_tail,
        }

    def __repr__(self) -> str:
        stats = self.get_memory_stats()
        return (
            f"{type(self).__name__}({stats['num_layers']} layers, {stats['seq_len']} tokens, "
            f"{stats['compressed_tokens']} of them coded, {stats['total_mb']:.1f} MB)"
        )


def load_preset_cache(
    preset_path: str | os.PathLike[str],
    num_layers: int,
    device: str | torch.device = "cuda",
    adaptive: bool = False,
    compress_after: int = 512,
    keep_recent: int = 256,
    *,
    config: PreTrainedConfig | None = None,
) -> CompressedDynamicCache:
    """An empty cache from a preset file, the seed's JSON or ours.

    Seed-style presets compress values only (rank and int8), as the seed does; ours compress keys and values.

    A preset whose quality was never measured at its rate gives an `UnverifiedPresetWarning`, once.

    Args:
        preset_path: a ``.json`` or ``.safetensors`` preset.
        num_layers: the model's number of layers.
        device: where the model's tensors are.
        adaptive: keep sequences up to ``compress_after`` tokens and the last ``keep_recent`` tokens exact. Without
            it everything is coded as soon as it fills a block, but for the first tokens that ours always keep.
        compress_after: tokens.
        keep_recent: tokens.
        config: the model's; see `CompressedDynamicCache`. The preset is checked against it.

    Raises:
        PresetError: a file that cannot be read as a preset, or one for another model or number of layers.
        DeviceError: a device that this machine lacks.
        ShapeError: negative lengths.
    """
    preset = Preset.load(preset_path)
    if preset.n_layers != num_layers:
        raise PresetError(
            f"the preset {os.fspath(preset_path)} is for {preset.meta['model']} with {preset.n_layers} layers, "
            f"the model has {num_layers}; use the preset of this model"
        )
    warn_if_unverified(preset)
    return CompressedDynamicCache._from_preset(
        preset, config, compress_after if adaptive else 0, keep_recent if adaptive else 0, device
    )
