"""Second-order information about a model: which errors in K and V its predictions notice.

The metric of choice is the Fisher information of K and V, estimated from gradients of the log-likelihood of
next tokens *sampled from the model itself* (with the text's own tokens it would be the "empirical Fisher",
which measures how the model fails on that text). The expected squared gradient gives the Kullback-Leibler
divergence that a small error causes, to second order. Where no gradient can be had, attention's own quadratic
forms stand in: E[q qT] for keys, the output projection for values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CalibrationError, ModelError, NonFiniteError, ShapeError
from ..given_model import decoder_inputs, evaluation_mode, input_device
from .layer_probe import HeldLayer, held_layers
from .quality.two_sided import TwoSidedPlan, two_sided

_OUTPUT_NAMES = ("o_proj", "c_proj", "dense", "out_proj", "wo", "proj")
# What to do where a layer computes without gradients, as some quantised ones do.
NO_GRADIENT = (
    "some layer computes without gradients; calibrate without them too (CalibrationOptions(gradients=False), "
    "--no-gradients), or calibrate the model before it was quantised: a preset of that serves this model"
)
_MAX_LOGITS = 1 << 22  # logits handled at once when sampling


@dataclass(frozen=True)
class FisherStats:
    """What one `fisher_pass` saw.

    Attributes:
        n_positions: positions at which next tokens were sampled, B * T.
        n_samples: samples per position, that is backward passes.
        text_nll: sum of -log p of the text's own next tokens in nats, over B * (T - 1) positions.
        sampled_nll: mean over samples of the sum of -log p of the sampled tokens in nats.
    """

    n_positions: int
    n_samples: int
    text_nll: float
    sampled_nll: float


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no parameter wants a gradient, but the embeddings' output does."""
    # By name: hooks that bring offloaded weights put new parameters in the place of old ones.
    flags = {
        name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)
    }

    def want_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    embeddings = (model.get_decoder() if model.config.is_encoder_decoder else model).get_input_embeddings()
    hook = embeddings.register_forward_hook(want_gradient)
    try:
        with evaluation_mode(model):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
    finally:
        hook.remove()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(flags[name])
        # What a module keeps for its next pass (RecurrentGemma's states) is cut from the graph of this one.
        for module in model.modules():
            for name, kept in list(vars(module).items()):
                if isinstance(kept, Tensor) and kept.grad_fn is not None:
                    setattr(module, name, kept.detach())


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] < 2 or input_ids.is_floating_point():
        raise ShapeError(f"input_ids must be integers [batch, at least 2], got {tuple(input_ids.shape)}")


@torch.no_grad()
def _sampled_gradient(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Sample one token per row and differentiate the loss.

    Args:
        logits: [N, V].

    Returns:
        d(sum of -log p(sampled)) / d logits = p - onehot(sampled), [N, V] in the logits' dtype, and the loss
        in nats.

    The gradient is written down rather than left to autograd, which would keep several more [N, V] tensors
    alive.
    """
    gradient = torch.empty_like(logits)
    nll = 0.0
    step = max(1, _MAX_LOGITS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        p = torch.softmax(logits[start : start + step].double(), dim=-1)
        cumulative = p.cumsum(dim=-1)
        # Inverse CDF with uniform numbers from the generator's own device: the same tokens on any device.
        uniform = torch.rand(p.shape[0], 1, generator=generator, device=generator.device, dtype=torch.float64)
        target = uniform.to(p.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp_max(p.shape[1] - 1)
        nll -= float(p.gather(1, token).log().sum())
        p.scatter_add_(1, token, torch.full_like(target, -1.0))
        gradient[start : start + step] = p
    return gradient, nll


@torch.no_grad()
def _text_nll(logits: Tensor, input_ids: Tensor) -> float:
    """Sum of -log p of the text's own next tokens in nats; logits [B, T, V], input_ids [B, T]."""
    rows = logits[:, :-1].flatten(0, 1)
    tokens = input_ids[:, 1:].flatten()
    step = max(1, _MAX_LOGITS // rows.shape[1])
    losses = [
        nn.functional.cross_entropy(row.float(), token, reduction="sum")
        for row, token in zip(rows.split(step), tokens.split(step), strict=True)
    ]
    return float(torch.stack(losses).sum(dtype=torch.float64))


def fisher_pass(
    model: PreTrainedModel,
    input_ids: Tensor,
    plan: TwoSidedPlan,
    generator: torch.Generator,
    n_samples: int = 1,
) -> FisherStats:
    """One window: hand ``plan.on_backward`` the gradients of sampled next tokens' log-likelihood.

    The loss is the *sum* over positions of -log p(sampled token), so gradients do not shrink with the window.
    A token is sampled at every position, the last included. Each further sample costs one more backward pass
    and calls ``on_backward`` once more per layer.

    Args:
        input_ids: [B, T] without padding.
        generator: source of the samples; its state advances, and equal states give equal results.

    Raises:
        CalibrationError: the plan has no ``on_backward``, n_samples < 1, or the model computes without gradients.
        NonFiniteError: the model's logits are not finite.
    """
    _check_ids(input_ids)
    if plan.on_backward is None:
        raise CalibrationError("fisher_pass needs a plan with on_backward")
    if n_samples < 1:
        raise CalibrationError(f"n_samples must be at least 1, got {n_samples}")
    sampled = 0.0
    with torch.enable_grad(), _frozen(model), two_sided(model, plan) as inputs:
        logits = model(**decoder_inputs(model, input_ids), **inputs()).logits
        if not torch.isfinite(logits.detach()).all():
            raise NonFiniteError("the model's logits are not finite on the calibration text")
        if not logits.requires_grad:
            raise CalibrationError(f"the logits carry no gradient: {NO_GRADIENT}")
        rows = logits.flatten(0, 1)
        for sample in range(n_samples):
            gradient, nll = _sampled_gradient(rows.detach(), generator)
            sampled += nll
            rows.backward(gradient, retain_graph=sample + 1 < n_samples)
            del gradient
    text = _text_nll(logits.detach(), input_ids.to(logits.device))
    return FisherStats(input_ids.numel(), n_samples, text, sampled / n_samples)


def gradient_free_pass(
    model: PreTrainedModel, input_ids: Tensor, on_layer: Callable[[int, Tensor, Tensor, Tensor], None]
) -> None:
    """One window without gradients: show every layer's queries, keys and values, all after RoPE.

    Args:
        input_ids: [B, T] without padding.
        on_layer: ``(layer, q[B, n_heads, T, D], k[B, n_kv_heads, T, D], v)`` in float32 or wider.
    """
    _check_ids(input_ids)
    plan = TwoSidedPlan(on_forward=on_layer)
    with torch.no_grad(), evaluation_mode(model), two_sided(model, plan) as inputs:
        # The base model: the logits, the largest tensor of a pass, are not needed.
        model.base_model(**decoder_inputs(model, input_ids), **inputs())


@torch.no_grad()
def _linear_map(projection: nn.Module, model: PreTrainedModel) -> Tensor | None:
    """The matrix [out, in] by which a module multiplies, float64 on the CPU; None for a module that is not linear.

    Only a plain weight is read. Of anything else (quantised, offloaded, with an adapter) the module itself tells: its
    outputs for unit vectors, times 256 so that a bias adds little rounding, less those for zero.
    """
    weight = getattr(projection, "weight", None)
    if type(projection) in (nn.Linear, Conv1D) and isinstance(weight, Tensor) and not weight.is_meta:
        weight = weight.detach().to("cpu", torch.float64)
        return weight.T if isinstance(projection, Conv1D) else weight  # GPT-2 stores [in, out]
    n_inputs = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
    if not isinstance(n_inputs, int):
        return None
    with evaluation_mode(projection):
        inputs = 256 * torch.eye(n_inputs + 1, n_inputs, dtype=model.dtype, device=input_device(model))
        outputs = projection(inputs[None])
    if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[:2] != (1, n_inputs + 1):
        return None
    outputs = outputs[0].to("cpu", torch.float64)
    return (outputs[:-1] - outputs[-1]).T / 256


def output_projection_metric(model: PreTrainedModel, layer_idx: int) -> Tensor:
    """`layer_output_metric` of the layer with this index.

    Raises:
        ModelError: no such layer, or as there.
    """
    layer = held_layers(model).get(layer_idx)
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no attention layer {layer_idx}")
    return layer_output_metric(model, layer)


def layer_output_metric(model: PreTrainedModel, layer: HeldLayer) -> Tensor:
    """How strongly errors in each KV head's values reach the residual stream.

    Returns:
        [n_kv_heads, D, D] float64 on the CPU: the sum over the query heads h of a KV head's group of W_hT
        W_h, W_h [hidden, D] being the columns of the output projection that head h feeds.

    Raises:
        ModelError: no linear output projection was found.
    """
    module = layer.module
    projection = next((p for name in _OUTPUT_NAMES if (p := getattr(module, name, None)) is not None), None)
    weight = None if projection is None else _linear_map(projection, model)
    if weight is None:
        raise ModelError(
            f"{type(module).__name__}: no linear output projection among its parts (looked for "
            f"{', '.join(_OUTPUT_NAMES)}); calibrate it with gradients"
        )
    if weight.shape[1] % (layer.n_kv_heads * layer.value_dim):
        raise ModelError(
            f"{type(module).__name__}: an output projection of {weight.shape[1]} inputs does not split into heads of "
            f"{layer.value_dim} values, equally many for each of {layer.n_kv_heads} KV heads"
        )
    by_head = weight.unflatten(1, (layer.n_kv_heads, -1, layer.value_dim))
    return torch.einsum("okgd,okge->kde", by_head, by_head)
