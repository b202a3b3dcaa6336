"""`CompressedDynamicCache`: a `DynamicCache` that holds keys and values compressed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compressors import IdentityCompressor
from ..devices import available_device
from ..errors import CacheStateError, ModelError, ShapeError
from ..given_model import input_device, transformers_model
from ..preset import Preset, Side, warn_if_unverified
from ..preset_compressors import preset_compressor
from ..saved import by_maker
from .builder import make_layers
from .container import SavedCache
from .layer import CompressedLayer
from .layer_kinds import Stock, check_kinds
from .memory_stats import memory_stats
from .padding import PaddedRows
from .passes import Pass, tokens_of_each
from .portable_cache import PortableCache


class CompressedDynamicCache(PortableCache):
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

    #: Of a cache that was loaded: the ids that it was saved with, [B, n_tokens]; else None.
    loaded_token_ids: Tensor | None = None

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
        layers = make_layers(
            k_compressors, v_compressors, num_layers, compress_start_len, uncompressed_tail, config, device
        )
        super().__init__()
        # A fixed list of layers instead of one class to replicate: a model with more layers must not go on unnoticed.
        self.layers = layers
        self.layer_class_to_replicate = None
        self.compress_start_len = compress_start_len
        self.uncompressed_tail = uncompressed_tail
        self._begin_process()

    @classmethod
    def from_preset(
        cls,
        preset: Preset,
        *,
        model: PreTrainedModel | None = None,
        compress_start_len: int = 0,
        uncompressed_tail: int = 128,
        device: str | torch.device | None = None,
    ) -> CompressedDynamicCache:
        """A cache with a preset's codecs.

        Args:
            uncompressed_tail: as above; 128 latest tokens, as presets are measured. With none the divergence from the
                exact cache is ten times as large (docs/prefixes.md).
            model: checks that the preset is this model's, and gives the cache the model's config (see above).

        Raises:
            PresetError: a preset that was calibrated for another model.
            DeviceError: a device that this machine lacks.
        """
        config = model.config if model is not None else None
        cache = cls._from_preset(preset, config, compress_start_len, uncompressed_tail, device)
        if model is not None:
            cache._model = ref(model)
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
            check_kinds(preset, config)
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

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        preset: Preset | None = None,
        model: PreTrainedModel | None = None,
        device: str | torch.device | None = None,
    ) -> CompressedDynamicCache:
        """The cache that `save` has written. It goes on as that one would have, to the bit.

        The file is mapped, and on the CPU attention reads the blocks in it: nobody may write to it meanwhile. All of it
        is checked first.

        Args:
            preset: that packed it; by default the one of its digest that this process holds, or comes with the package.
            model: checks that the cache is this model's, of the same weights where the file names them.
            device: where the model's tensors are; by default where the model is, else the CPU.

        Raises:
            ContainerError: no such file, or one that is damaged, cut short, newer, or something else.
            PresetError: another preset, none that is loaded, or a model of another config.
            ModelError: a model of other weights.
            DeviceError: a device that this machine lacks.
        """
        saved = SavedCache(path)
        preset = saved.preset(preset)
        if model is not None:
            saved.check_model(preset, model)
            device = device if device is not None else input_device(transformers_model(model))
        wanted = available_device(device if device is not None else "cpu")
        header = saved.header
        cache = cls._from_preset(
            preset, None, header["compress_start_len"], header["uncompressed_tail"], wanted
        )
        saved.fill(cache.layers, wanted)
        cache.loaded_token_ids, cache._weights = saved.token_ids(), header["weights"]
        if model is not None:
            cache._model = ref(model)
            warn_if_unverified(preset)
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one layer's new keys and values.

        Returns:
            All keys and values of the layer, lazily (`kvlathe.lazy`): attention is served from the blocks, everything
            else meets ordinary tensors.

        Raises:
            ShapeError: a layer beyond ``num_layers``: the cache was made for another model.
            ModelError: a model with cross-attention that was handed this cache for both of its attentions.
            CacheStateError: another thread uses the cache as well.
        """
        if torch.compiler.is_compiling():
            return self._update_uncompiled(key_states, value_states, layer_idx, *args, **kwargs)

        def hand_out(layer: CompressedLayer) -> tuple[torch.Tensor, torch.Tensor]:
            return layer.hand_out(key_states, value_states, self._expansions, layer_idx)

        return self._add(hand_out, key_states, value_states, layer_idx, *args, **kwargs)

    def _add(
        self,
        to_ours: Callable[[CompressedLayer], tuple[torch.Tensor, torch.Tensor]],
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens: as ``to_ours`` does it to a layer of ours, to one of transformers' by its `update`."""
        if layer_idx >= len(self.layers):
            raise ShapeError(
                f"the model has a layer {layer_idx}, this cache was made for {len(self.layers)} layers; "
                f"pass num_layers=model.config.num_hidden_layers and a preset of this model"
            )
        if self._is_asked:
            self._is_asked = False
            self._begin_pass()
        passes, layer = self._passes, self.layers[layer_idx]
        outermost = not passes.is_held
        try:
            passes.enter("update()")
            self._expansions.begin_layer()
            current = passes.current
            if current is not None:
                self._check_pass(layer_idx, current)
            if not isinstance(layer, CompressedLayer):
                states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            else:
                states = to_ours(layer)
                if current is not None:
                    passes.note(current, layer_idx, layer.get_seq_length())
                else:
                    # By hand, or by a model that makes its masks without asking us: nobody says if attention will come.
                    layer.settle_or_take_back(key_states.shape[2])
            if current is None:
                passes.see(None)
        finally:
            if outermost:
                passes.leave()
        return states

    @torch.compiler.disable
    def _update_uncompiled(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For a compiled model: ordinary tensors, in the one place of a layer where its graph is left."""

        def expand(layer: CompressedLayer) -> tuple[torch.Tensor, torch.Tensor]:
            if layer.get_seq_length():
                self._expansions.add(layer_idx, "its model is compiled, and graphs take ordinary tensors")
            return layer.update(key_states, value_states)

        return self._add(expand, key_states, value_states, layer_idx, *args, **kwargs)

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """Tell an empty cache that rows of the coming batch begin with padding: their first real tokens stay exact.

        Models whose attention is torch's `scaled_dot_product_attention` show it in their masks, and so do attached
        ones. Call it for others, before the first pass. It serves layers of full attention; in a sliding window the
        first ones of all rows, padding or not, are exact.

        Args:
            attention_mask: [B, tokens], 0 for padding, as a tokenizer gives it.

        Raises:
            ShapeError: a mask of another shape.
            CacheStateError: the cache is not empty.
        """
        if attention_mask.dim() != 2:
            raise ShapeError(
                f"the attention mask has the shape {list(attention_mask.shape)}, expected [batch, tokens]; give the "
                f"one that the tokenizer gave"
            )
        if self.get_seq_length():
            raise CacheStateError(
                f"note_padding() comes before the first tokens, and this cache holds {self.get_seq_length()}; reset() "
                f"empties it"
            )
        rows = PaddedRows.of(attention_mask)
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.padding_noted = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; see `DynamicCache`."""
        n_tokens = super().get_seq_length(layer_idx)
        # Layers with recurrent states count no tokens, nor do those that a model leaves out.
        counts = n_tokens or not any(
            isinstance(each, CompressedLayer) and each.held[0] for each in self.layers
        )
        if counts and not torch.compiler.is_compiling():
            self._passes.see(n_tokens)
        return n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of tokens, and position of the first of them, that `update` will return.

        Raises:
            CacheStateError: another thread is in the middle of a pass through the model, or an earlier pass was cut
                short and left the layers unlike.
        """
        # Models ask for this before their first layer runs.
        if torch.compiler.is_compiling():
            # All that compiled code can do: the first update begins the pass.
            self._is_asked = True
        else:
            self._begin_pass()
        return super().get_mask_sizes(query_length, layer_idx)

    def _begin_pass(self) -> None:
        self._passes.await_generation(self)
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        # Some models leave layers out, always the same ones.
        held = [layer.held for layer in compressed if layer.get_seq_length()]
        if compressed:
            self._passes.begin(tokens_of_each(held), len(compressed))
        self._expansions.begin_pass()

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
            self._check_states_crop(tokens_to_remove, -min(removed))
            self._passes.end()
            self._passes.see(None)
            for layer, n_tokens in zip(self.layers, removed, strict=True):
                layer.crop(n_tokens)

    def reset(self) -> None:
        """Empty the cache, for a new sequence. Works in whatever state an exception has left the cache."""
        self._passes = self._passes.after_reset()
        super().reset()
        self.loaded_token_ids, self._weights = None, ""

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

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.__getstate__()
        layers = [
            layer if isinstance(layer, CompressedLayer) else Stock(layer) for layer in state.pop("layers")
        ]
        return by_maker("cache", None if type(self) is CompressedDynamicCache else type(self), layers, state)

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
            of packed blocks with their side information and padding; imported_bytes of these lie in somebody else's
            memory, such as a mapped file. uncompressed_bytes_equivalent: what `DynamicCache`
            would take, and compression_ratio, their quotient. bits_per_value: total bits over all numbers held.
            compressed_tokens (the most that any layer holds coded) and uncompressed_tokens add up to seq_len.
            window_layers: those that hold their sliding window only. stock_layers: transformers' own, with
            stock_bytes, which are part of exact_bytes and of the equivalent, not of bits_per_value. expanded_layers:
            those that the latest pass expanded, as their attention could not be served from packed tokens. The codec's
            own tables, which all caches of a preset share, are not counted.
        """
        return {
            **memory_stats(self.layers, self.get_seq_length()),
            "expanded_layers": self._expansions.n_layers,
            "compress_start_len": self.compress_start_len,
            "uncompressed_tail": self.uncompressed_tail,
        }

    def __repr__(self) -> str:
        stats = self.get_memory_stats()
        return (
            f"{type(self).__name__}({stats['num_layers']} layers, {stats['seq_len']} tokens, "
            f"{stats['compressed_tokens']} of them coded, {stats['total_mb']:.1f} MB)"
        )
