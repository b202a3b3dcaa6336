"""A model's basis: text → moments → basis. The forward and backward pass is here; moments and design are native."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._native import Moments, cache_fingerprint, fingerprint
from ..errors import CalibrationError, CalibrationWarning
from ..given_model import check_predicts_tokens, check_weights, transformers_model
from ..preset import Preset, config_json
from ..progress import progress
from .fisher import NO_GRADIENT, fisher_pass, gradient_free_pass, layer_output_metric
from .layer_probe import HeldLayer
from .quality.two_sided import TwoSidedPlan
from .rope_probe import ProbeResult, probe_rope
from .sensitivity import cost_factors

# In place of a frequency of 0, which presets do not have and Gemma 4 has for what it does not rotate: no position makes
# an angle of it.
_STILL = 1e-30
# The seed's published sweet spot: three quarters of head_dim at int8.
_SHARED_RANK_FRACTION = 0.75


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model is calibrated.

    Attributes:
        block_len: tokens in a packed block: 8, 16, 32, 64, 128 or 256.
        n_sinks: first tokens that stay exact.
        tail: latest tokens that the calibrated cache is expected to keep exact; only queries farther away
            count for the gradients. A cache may keep more or fewer.
        shrinkage: share of the metric replaced by a multiple of the identity, 0 to 1.
        n_samples: next tokens sampled a position (backward passes a window).
        gradients: False uses E[q qT] and the output projection instead of the Fisher metric.
        seed: of the sampled tokens.
        cost_windows: windows on which each layer's cost is measured end to end (`sensitivity`); 0 trusts the metric
            alone. Models in float16 and bfloat16 round by more than a layer's cost, and are not measured.
    """

    block_len: int = 64
    n_sinks: int = 4
    tail: int = 128
    shrinkage: float = 0.3
    n_samples: int = 1
    gradients: bool = True
    seed: int = 0
    cost_windows: int = 1


def _heads_first(x: Tensor, first: int = 0) -> Tensor:
    """[B, H, T, D] of one window to contiguous float32 [H, T − first, D] on the CPU: its tokens from ``first`` on."""
    return x[0, :, first:].detach().to("cpu", torch.float32).contiguous()


def _moments(probe: ProbeResult) -> Moments:
    """No text yet."""
    layers: list[Any] = []
    for layer, rope in zip(probe.layers, probe.ropes, strict=True):
        rotation = rope and (
            str(rope.pairing),
            int(rope.rotary_dim),
            rope.inv_freq.clamp_min(_STILL).tolist(),
        )
        layers.append(layer and (*layer.sizes, rotation))
    return Moments(layers)


def _fisher_moments(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    moments: Moments,
    layers: Mapping[int, HeldLayer],
    options: CalibrationOptions,
) -> None:
    generator = torch.Generator(device="cpu").manual_seed(options.seed)
    n_threads = torch.get_num_threads()

    # Layers of full attention keep sinks exact, and they look like no other tokens.
    first = options.n_sinks
    reached: set[int] = set()

    def on_backward(layer: int, k: Tensor, v: Tensor, dk_far: Tensor, dv_far: Tensor) -> None:
        if layer not in layers:
            return
        reached.add(layer)
        moments.add(layer, "key", _heads_first(k, first), _heads_first(dk_far, first), first, n_threads)
        moments.add(layer, "value", _heads_first(v, first), _heads_first(dv_far, first), first, n_threads)

    plan = TwoSidedPlan(tail=options.tail, n_sinks=options.n_sinks, on_backward=on_backward)
    for window in progress(windows, "calibrating", "window"):
        fisher_pass(model, window[None], plan, generator, options.n_samples)
        if missing := sorted(set(layers) - reached):
            raise CalibrationError(
                f"no gradient reaches the keys and values of layers {missing}: {NO_GRADIENT}"
            )


def _gradient_free_moments(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    moments: Moments,
    layers: Mapping[int, HeldLayer],
    n_sinks: int,
) -> None:
    n_threads = torch.get_num_threads()

    def on_layer(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer not in layers:
            return
        moments.add(layer, "key", _heads_first(k, n_sinks), None, n_sinks, n_threads)
        moments.add(layer, "value", _heads_first(v, n_sinks), None, n_sinks, n_threads)
        queries = _heads_first(q)
        n_heads, n_tokens, head_dim = queries.shape
        n_kv_heads = layers[layer].n_kv_heads
        grouped = queries.reshape(n_kv_heads, n_heads // n_kv_heads * n_tokens, head_dim)
        moments.add_queries(layer, 0, n_tokens, grouped)

    for window in progress(windows, "calibrating without gradients", "window"):
        gradient_free_pass(model, window[None], on_layer)


def _warn(note: str) -> None:
    warnings.warn(note, CalibrationWarning, stacklevel=3)


def _score_scale(model: PreTrainedModel, head_dim: int) -> float:
    config = model.config.get_text_config(decoder=True)
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim
    return float(scalar) ** -0.5


def calibrate(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    name: str = "",
    text_name: str = "",
    options: CalibrationOptions | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Preset:
    """Calibrate a model on windows of tokens. The preset has no bits yet: see `Preset.with_bits` and `tune`.

    Args:
        model: a decoder, on any device or offloaded, or a wrapper around one. Its layers of attention are calibrated,
            those of other kinds stay as they are. It computes without dropout, whatever its mode, and is left in its
            mode.
        windows: LongTensors [T]; every window longer than ``tail + n_sinks``.
        name: what the preset calls the model; its own name by default.
        text_name: what the preset says of the text.
        on_note: takes sentences for people, such as a layer whose rotation was not found. Without it they are given as
            `CalibrationWarning`. The preset keeps what was found about the model's rotations.

    Raises:
        CalibrationError: windows too short or too few, or moments that allow no design.
        ModelError: a model without keys and values that can be coded (see `coded_layers`), one without weights, or
            without logits of next tokens where gradients or measured costs need them.
    """
    model = transformers_model(model)
    options = options or CalibrationOptions()
    if not windows:
        raise CalibrationError("no windows of text to calibrate on")
    shortest = min(len(window) for window in windows)
    if shortest <= options.tail + options.n_sinks:
        raise CalibrationError(
            f"windows of {shortest} tokens have no token farther than the tail of {options.tail} and the "
            f"{options.n_sinks} sinks; use a longer window or a shorter tail"
        )
    check_weights(model)
    probe = probe_rope(model)
    if options.gradients or options.cost_windows > 0:
        check_predicts_tokens(model)
    on_note = on_note or _warn
    for note in probe.notes:
        on_note(note)
    layers = {index: layer for index, layer in enumerate(probe.layers) if layer is not None}
    first = next(iter(layers.values()))
    moments = _moments(probe)
    grams: list[list[list[float]]] | None = None
    if options.gradients:
        _fisher_moments(model, windows, moments, layers, options)
    else:
        _gradient_free_moments(model, windows, moments, layers, options.n_sinks)
        grams = [
            [] if layer is None else layer_output_metric(model, layer).flatten(1).tolist()
            for layer in probe.layers
        ]
    least_dim = min(dim for layer in layers.values() for dim in (layer.key_dim, layer.value_dim))
    meta: dict[str, Any] = {
        "model": name or str(getattr(model.config, "name_or_path", "") or type(model).__name__),
        "rank": max(1, int(least_dim * _SHARED_RANK_FRACTION)),
        "head_dim": first.key_dim,
        "n_layers": len(probe.layers),
        "n_heads": probe.n_heads,
        "n_kv_heads": first.n_kv_heads,
        "block_len": options.block_len,
        "n_sinks": options.n_sinks,
        "fingerprint": fingerprint(config_json(model.config)),
        "cache_fingerprint": cache_fingerprint(config_json(model.config)),
        "model_type": str(model.config.get_text_config(decoder=True).model_type),
        "created": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "calibration": {
            **asdict(options),
            "text": text_name,
            "n_tokens": sum(len(window) for window in windows),
            "n_windows": len(windows),
            "window": max(len(window) for window in windows),
            "metric": "fisher" if options.gradients else "queries and output projection",
            "notes": probe.notes,
        },
    }
    native = moments.design(
        json.dumps(meta),
        block_len=options.block_len,
        shrinkage=options.shrinkage,
        shared_rank=meta["rank"],
        n_threads=torch.get_num_threads(),
        output_gram=grams,
        score_scale=_score_scale(model, first.key_dim),
    )
    return _with_measured_costs(model, Preset(native), windows, options, on_note)


def _with_measured_costs(
    model: PreTrainedModel,
    preset: Preset,
    windows: Sequence[Tensor],
    options: CalibrationOptions,
    on_note: Callable[[str], None],
) -> Preset:
    """The preset with importances that end-to-end measurement has put right, where it can be done."""
    if options.cost_windows <= 0:
        return preset
    if model.dtype != torch.float32:
        on_note(
            f"the model computes in {model.dtype}, too coarse to measure what each layer's coding costs; calibrate in "
            "float32 for about an eighth less KLD at the same bits"
        )
        return preset
    step = max(1, len(windows) // options.cost_windows)
    chosen = list(windows[::step])[: options.cost_windows]
    return preset.with_cost_factors(cost_factors(model, preset, chosen, tail=options.tail))
