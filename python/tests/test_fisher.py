"""The Fisher pass against autograd on explicit copies, and the metrics that need no gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvlathe.calibration.fisher import (
    _sampled_gradient,
    fisher_pass,
    gradient_free_pass,
    layer_output_metric,
    output_projection_metric,
)
from kvlathe.calibration.layer_probe import held_layers
from kvlathe.calibration.quality.two_sided import TwoSidedPlan
from kvlathe.errors import CalibrationError, ModelError, NonFiniteError, ShapeError
from kvlathe.model_loading import attention_modules
from tiny_models import TINY_NAMES, VOCAB, tiny

IDS = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
Seen = dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]


def _run(
    name: str, seed: int = 0, n_samples: int = 1, **plan: int
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    got: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    settings = TwoSidedPlan(**{"tail": 8, "n_sinks": 2, **plan}, on_backward=lambda *args: got.append(args))
    fisher_pass(tiny(name), IDS, settings, torch.Generator().manual_seed(seed), n_samples)
    return got


@pytest.mark.parametrize("name", TINY_NAMES)
def test_gradients_reach_every_layer(name: str) -> None:
    got = _run(name)
    n_layers = tiny(name).config.num_hidden_layers
    assert [layer for layer, *_ in got] == list(reversed(range(n_layers)))
    for _, k, v, dk, dv in got:
        assert k.shape == dk.shape and v.shape == dv.shape and k.shape[2] == 40
        assert k.dtype == dk.dtype == dv.dtype == torch.float32
        assert torch.isfinite(dk).all() and torch.isfinite(dv).all()
        # Tokens 2 .. 31 are far from some query, sinks and the last 8 from none.
        for gradient in (dk, dv):
            assert (gradient[:, :, 2:30].abs().sum(-1) > 0).any()
            assert (gradient[:, :, :2] == 0).all() and (gradient[:, :, 32:] == 0).all()


def test_far_gradient_is_the_derivative_of_the_loss() -> None:
    """With no tail and no sinks all pairs are far: compare with autograd's gradients of the biases.

    GPT-2 does not rotate its keys, so the gradients of a layer's keys sum to the gradient of their bias.
    """
    model = tiny("gpt2").double()
    got: Seen = {}
    plan = TwoSidedPlan(0, 0, on_backward=lambda layer, *rest: got.__setitem__(layer, rest))
    generator = torch.Generator().manual_seed(4)
    fisher_pass(model, IDS, plan, generator)

    logits = model(IDS, use_cache=False).logits[0]
    gradient, _ = _sampled_gradient(logits.detach(), torch.Generator().manual_seed(4))
    logits.backward(gradient)
    for layer, module in attention_modules(model).items():
        _, bias_k, bias_v = module.c_attn.bias.grad.split(64)
        _, _, dk, dv = got[layer]
        torch.testing.assert_close(dk.sum(dim=2).flatten(), bias_k, atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(dv.sum(dim=2).flatten(), bias_v, atol=1e-9, rtol=1e-8)


def test_same_generator_same_gradients() -> None:
    first, second, other = _run("llama"), _run("llama"), _run("llama", seed=1)
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x[1:], y[1:], strict=True)
    )
    assert not torch.equal(first[0][3], other[0][3])
    twice = _run("llama", n_samples=2)
    assert [layer for layer, *_ in twice] == [1, 0, 1, 0]
    torch.testing.assert_close(twice[0][3], first[0][3])
    assert not torch.equal(twice[2][3], first[0][3])


def test_sampling_follows_the_distribution() -> None:
    logits = torch.randn(1, 12).expand(20_000, 12)
    gradient, nll = _sampled_gradient(logits, torch.Generator().manual_seed(0))
    p = logits[0].softmax(dim=0)
    # The mean of p - onehot(sampled) vanishes.
    assert gradient.mean(dim=0).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    assert gradient.sum(dim=1).abs().max() < 1e-5
    assert nll / 20_000 == pytest.approx(-(p * p.log()).sum().item(), rel=0.02)


def test_a_token_without_probability_is_never_sampled() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(1000, 5)
    gradient, nll = _sampled_gradient(logits, torch.Generator().manual_seed(0))
    assert (gradient[:, [0, 2, 4]] == 0).all() and nll == pytest.approx(1000 * math.log(2))


def test_stats_and_restored_flags() -> None:
    model = tiny("gpt2").train()
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    plan = TwoSidedPlan(8, 2, on_backward=lambda *args: None)
    stats = fisher_pass(model, IDS, plan, torch.Generator().manual_seed(0))
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert (stats.n_positions, stats.n_samples) == (40, 1)
    expected = model.eval()(IDS, labels=IDS).loss.item() * 39
    assert stats.text_nll == pytest.approx(expected, rel=1e-5)
    assert stats.sampled_nll > 0


def test_errors() -> None:
    plan = TwoSidedPlan(on_backward=lambda *args: None)
    model, generator = tiny("llama"), torch.Generator()
    with pytest.raises(CalibrationError, match="on_backward"):
        fisher_pass(model, IDS, TwoSidedPlan(), generator)
    with pytest.raises(CalibrationError, match="n_samples"):
        fisher_pass(model, IDS, plan, generator, n_samples=0)
    with pytest.raises(ShapeError, match="integers"):
        fisher_pass(model, IDS[0], plan, generator)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(NonFiniteError, match="finite"):
        fisher_pass(model, IDS, plan, generator)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match="no attention layer 9"):
        output_projection_metric(model, 9)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_gradient_free_pass_shows_what_attention_sees(name: str) -> None:
    from transformers import DynamicCache

    model = tiny(name)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    gradient_free_pass(model, IDS, lambda layer, *qkv: seen.__setitem__(layer, qkv))
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    assert sorted(seen) == list(range(model.config.num_hidden_layers))
    for layer, (q, k, v) in seen.items():
        assert q.shape == (1, model.config.num_attention_heads, 40, k.shape[3]) and not q.requires_grad
        torch.testing.assert_close(k, cache.layers[layer].keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v, cache.layers[layer].values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_output_projection_metric_measures_the_module(name: str) -> None:
    """An error e in a KV head's value reaches head h's output as W_h e: run the projection and compare."""
    model = tiny(name)
    config = model.config
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", n_heads)
    # Found in float32, the one format that experts take.
    layer = held_layers(model)[1]
    metric, module = layer_output_metric(model.double(), layer), layer.module
    project = getattr(module, "o_proj", None) or getattr(module, "c_proj", None) or module.dense
    dim = metric.shape[-1]
    assert metric.shape == (n_kv, dim, dim)
    error = torch.randn(dim, dtype=torch.float64)
    with torch.no_grad():
        nothing = project(torch.zeros(n_heads * dim, dtype=torch.float64))
        for kv in range(n_kv):
            total = 0.0
            for head in range(kv * n_heads // n_kv, (kv + 1) * n_heads // n_kv):
                x = torch.zeros(n_heads, dim, dtype=torch.float64)
                x[head] = error
                total += (project(x.flatten()) - nothing).square().sum().item()
            assert (error @ metric[kv] @ error).item() == pytest.approx(total, rel=1e-9)
