"""Find each layer's rotary position embedding by experiment.

Configs name rotary embeddings in many ways, and what a layer does with them (pairing, partial rotation, two
bases, no rotation at all) is only in its code. So nothing is read from the config: every attention module is
fed one constant vector at all positions, which makes the keys k(p) = R(p) k_pre with an unknown but constant
k_pre. A guess of R is right exactly if undoing it gives constant vectors. The guesses come from the model's
frequency buffers, from the cos/sin tables that the layers are handed, and, if none of them fits, from the
keys themselves.

A constant factor folded into cos and sin (YaRN, longrope) leaves the keys constant, so it needs no attention
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..given_model import cache_argument, decoder_inputs, evaluation_mode, input_device, plain_tokens
from .layer_probe import HeldLayer, coded_layers
from .observing_cache import ObservingCache
from .rope_axes import has_several_axes
from .rope_frequencies import Pairing, buffer_frequencies, distinct, handed_frequencies, key_frequencies

_PAIRINGS: tuple[Pairing, ...] = ("half_split", "interleaved")
# Half precision rounds keys, cos and sin to 8 (bfloat16) or 11 (float16) significant bits.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_DEFAULT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's cache, where they are the same for all layers, and D the same for K and V."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class RopeProbe:
    """The rotation of one layer: pair i of the first ``rotary_dim`` components turns by p * inv_freq[i].

    Attributes:
        pairing: "half_split" pairs components i and i + rotary_dim / 2, "interleaved" 2i and 2i + 1.
        inv_freq: float64 [rotary_dim / 2], radians per position.
        residual: largest relative error over heads and pairs of the keys explained by this rotation.
    """

    pairing: Pairing
    rotary_dim: int
    inv_freq: Tensor
    residual: float


@dataclass(frozen=True)
class ProbeResult:
    """What `probe_rope` found.

    Attributes:
        layers: one a layer; None where it has no keys and values that can be coded.
        n_heads: query heads.
        ropes: one a layer; None where keys are not rotated, or not in a way that could be found.
        notes: for people: what could not be found, and what it costs.
    """

    layers: list[HeldLayer | None]
    n_heads: int
    ropes: list[RopeProbe | None]
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> ModelShape:
        """The sizes of all layers.

        Raises:
            ModelError: layers differ, or some are not coded.
        """
        sizes = {None if layer is None else layer.sizes for layer in self.layers}
        alike = sizes.pop()
        if sizes or alike is None or alike[1] != alike[2]:
            raise ModelError(
                "layers of this model differ in their keys and values, or have none; only models whose layers are all "
                "alike can be compared by this"
            )
        return ModelShape(len(self.layers), self.n_heads, *alike[:2])


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, pairing: Pairing) -> Tensor:
    """Turn the first 2 * len(inv_freq) components of x [..., N, D] by positions [N]; negative ones undo it.

    Returns float64.
    """
    n_pairs = inv_freq.numel()
    x = x.double()
    angle = positions.double()[:, None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    out = x.clone()
    if pairing == "half_split":
        first, second = slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)
    else:
        first, second = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def _recorder(seen: dict[int, Tensor]) -> Callable[[int, Tensor, Tensor], None]:
    """Notes the keys [H, N, D] of each layer."""

    def note(layer: int, keys: Tensor, values: Tensor) -> None:
        seen[layer] = keys[0].detach().clone()

    return note


@contextmanager
def _constant_inputs(
    modules: dict[int, nn.Module], tables: dict[int, list[Any]], seed: int
) -> Iterator[None]:
    """Replace every attention input by one vector for all positions; note the cos/sin tables handed in."""

    def hook_of(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tables.setdefault(layer, []).append(kwargs.get("position_embeddings"))
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            generator = torch.Generator().manual_seed(seed)
            vector = torch.randn(hidden.shape[-1], generator=generator).to(hidden)
            constant = vector.expand_as(hidden).contiguous()
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": constant}
            return (constant, *args[1:]), kwargs

        return hook

    with ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_pre_hook(hook_of(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _rope_entries(config: Any) -> list[dict[str, Any]]:
    """The config's RoPE settings: one dict, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [entry for entry in [rope, *rope.values()] if isinstance(entry, dict)]


def _position_limit(config: Any) -> int:
    """Positions below this see one set of frequencies; longrope and dynamic scaling switch beyond it."""
    limits = [
        getattr(config, name, None)
        for name in ("max_position_embeddings", "original_max_position_embeddings")
    ]
    limits += [entry.get("original_max_position_embeddings") for entry in _rope_entries(config)]
    known = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=2048)


def _changes_at(config: Any) -> int | None:
    """Sequence length beyond which the model itself switches to other frequencies; None if it never does."""
    changing = any(entry.get("rope_type") in ("longrope", "dynamic") for entry in _rope_entries(config))
    return _position_limit(config) if changing else None


def _residual(keys: Tensor, positions: Tensor, inv_freq: Tensor | None, pairing: Pairing) -> float:
    """How far from constant the un-rotated keys [H, N, D] are: the worst head and pair, relative to its size.

    By pair, because a few huge components (key biases of Qwen2) would hide the rest. A pair counts as at
    least 1 % of its head's mean size, so that rounding of tiny components does not matter.
    """
    still = keys.double() if inv_freq is None else rotate(keys, -positions, inv_freq, pairing)
    error = (still - still.mean(dim=1, keepdim=True)).square().mean(dim=1)
    size = still.square().mean(dim=1)
    rotated = 0 if inv_freq is None else 2 * inv_freq.numel()

    def by_pair(x: Tensor) -> Tensor:
        turned, rest = x[:, :rotated], x[:, rotated:]
        pairs = (
            turned.unflatten(1, (2, -1)).sum(1)
            if pairing == "half_split"
            else turned.unflatten(1, (-1, 2)).sum(2)
        )
        return torch.cat([pairs, 2 * rest], dim=1) if rotated else 2 * rest

    floor = 1e-4 * 2 * size.mean(dim=1, keepdim=True)
    ratio = by_pair(error) / torch.maximum(by_pair(size), floor).clamp_min(1e-60)
    return float(ratio.max().sqrt())


def _best(keys: Tensor, positions: Tensor, candidates: Sequence[Tensor]) -> RopeProbe | float:
    """The rotation that explains the keys best, or the residual without one if none explains them better."""
    plain = _residual(keys, positions, None, "half_split")
    best: RopeProbe | float = plain
    least = plain
    for pairing in _PAIRINGS:
        for inv_freq in candidates:
            residual = _residual(keys, positions, inv_freq, pairing)
            if residual < least:
                least = residual
                best = RopeProbe(pairing, 2 * inv_freq.numel(), inv_freq, residual)
    return best


def _error_of(best: RopeProbe | float) -> float:
    return best.residual if isinstance(best, RopeProbe) else best


@torch.no_grad()
def probe_rope(
    model: PreTrainedModel, *, n_tokens: int = 64, offset: int = 1000, seed: int = 0
) -> ProbeResult:
    """Find the sizes of a model's cache and the rotation of each layer's keys.

    Args:
        n_tokens: positions per run.
        offset: first position of a second run, which tells slow frequencies apart; brought down to what the
            model allows, and left out where it takes no position ids.

    Raises:
        ModelError: a model without layers that can be coded; see `coded_layers`.
    """
    config = model.config.get_text_config(decoder=True)
    limit = _position_limit(config)
    n_tokens = min(n_tokens, limit)
    offset = min(offset, limit - n_tokens)
    layers = coded_layers(model)
    modules = {index: layer.module for index, layer in enumerate(layers) if layer is not None}
    device = input_device(model)
    given = decoder_inputs(model, plain_tokens(model, n_tokens, seed)[None])
    notes: list[str] = []
    tables: dict[int, list[Any]] = {}
    runs: list[dict[int, Tensor]] = []
    starts = [0, offset] if offset >= n_tokens else [0]
    with evaluation_mode(model), _constant_inputs(modules, tables, seed):
        for start in starts:
            seen: dict[int, Tensor] = {}
            cache = ObservingCache(model.config, _recorder(seen))
            positions = torch.arange(start, start + n_tokens, device=device)[None]
            try:
                extra = {"position_ids": positions} if start else {}
                decoder = cast(PreTrainedModel, model.base_model)
                cached = cache_argument(decoder, cache)
                decoder(**given, use_cache=True, **cached, **extra)
            except (TypeError, ValueError, IndexError) as error:
                if not start:
                    raise ModelError(
                        f"{type(model).__name__} did not run on {n_tokens} tokens: {error}"
                    ) from error
                notes.append(f"no second run at position {start}: {error}")
                continue
            runs.append(seen)
    starts = starts[: len(runs)]
    positions = torch.cat([torch.arange(start, start + n_tokens) for start in starts])
    tolerance = _TOLERANCE.get(next(iter(runs[0].values())).dtype, _DEFAULT_TOLERANCE)
    buffers = buffer_frequencies(model)
    ropes: list[RopeProbe | None] = [None] * len(layers)
    for layer, held in enumerate(layers):
        if held is None:
            continue
        named = distinct(buffers, held.key_dim)
        keys = torch.cat([run[layer] for run in runs], dim=1).to("cpu", torch.float64)
        best = _best(keys, positions, named)
        if _error_of(best) > tolerance:
            handed = handed_frequencies(tables.get(layer, [])[: len(runs)], positions, n_tokens)
            best = _best(keys, positions, distinct(handed, held.key_dim))
        if _error_of(best) > tolerance:
            # Rotations without tables that we know, such as GPT-J's: measure the keys themselves.
            measured = [
                f for pairing in _PAIRINGS for f in key_frequencies(keys, positions, n_tokens, pairing)
            ]
            best = _best(keys, positions, distinct(measured, held.key_dim))
        explained = _error_of(best) <= tolerance
        ropes[layer] = best if explained and isinstance(best, RopeProbe) else None
        if not explained:
            notes.append(
                f"layer {layer}: keys depend on position, but no known rotation explains it (best relative "
                f"residual {_error_of(best):.2g}); they are coded as they come, which costs some quality"
            )
    if any(ropes) and (change := _changes_at(config)):
        notes.append(
            f"the rotation changes when a sequence grows beyond {change} tokens; found: the one below that"
        )
    if any(ropes) and has_several_axes(model):
        notes.append(
            "keys turn by positions of several axes (M-RoPE), of which a cache sees none: blocks are turned by the "
            "index of their slots. That is right for text; keys of images and videos are coded with a larger error, "
            "above all where keys have large biases (docs/calibration_guide.md, Images)"
        )
    first = next(layer for layer in layers if layer is not None)
    return ProbeResult(layers, int(getattr(config, "num_attention_heads", first.n_kv_heads)), ropes, notes)
