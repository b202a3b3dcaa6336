"""Two-sided attention: gradients against autograd on two copies, coded attention against a loop over
queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kvlathe.calibration.quality.two_sided import ATTENTION_NAME, TwoSidedPlan, two_sided, two_sided_attention
from kvlathe.errors import CalibrationError, ModelError, ShapeError
from tiny_models import ENCODER_DECODERS, TINY_NAMES, VOCAB, tiny

EAGER = {"gemma2", "gpt_oss"}  # SDPA leaves out their softcap or their sinks


def _inputs(n_q: int = 23, n_k: int = 23, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 8), (2, 3, n_k, 8), (2, 3, n_k, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def _far(n_q: int, n_k: int, plan: TwoSidedPlan) -> Tensor:
    q_pos = torch.arange(n_k - n_q, n_k)[:, None]
    k_pos = torch.arange(n_k)
    return (q_pos - k_pos >= plan.tail) & (k_pos >= plan.n_sinks)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_far: Tensor,
    v_far: Tensor,
    visible: Tensor,
    plan: TwoSidedPlan,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Plain attention with two explicit copies; ``visible`` broadcasts to [B, H, Tq, L]."""
    group = q.shape[1] // k.shape[1]
    k, v, k_far, v_far = (x.repeat_interleave(group, dim=1) for x in (k, v, k_far, v_far))
    far = _far(q.shape[2], k.shape[2], plan)
    scores = torch.where(far, q @ k_far.mT, q @ k.mT) * q.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if s_aux is not None:
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        p = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        p = scores.softmax(dim=-1)
    return (p * ~far) @ v + (p * far) @ v_far


def _visible(kind: str, n: int) -> tuple[Tensor, Tensor | None, int | None]:
    """(what may be seen, the mask to pass, the sliding window to pass)."""
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    window = causal & ~torch.ones(n, n, dtype=torch.bool).tril(-9)
    if kind == "none":
        return causal, None, None
    if kind == "window":
        return window, None, 9
    if kind == "window_mask":
        return window, window[None, None], None
    padded = causal.repeat(2, 1, 1, 1)
    padded[1, :, :, :3] = False
    padded[1, :, range(3), range(3)] = True
    if kind == "padding":
        return padded, padded, None
    additive = torch.zeros(padded.shape, dtype=torch.float64).masked_fill(~padded, -math.inf)
    return padded, additive, None


@pytest.mark.parametrize("kind", ["none", "window", "window_mask", "padding", "additive"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("tail", "n_sinks"), [(5, 2), (0, 0), (100, 4), (1, 30)])
def test_far_gradients_equal_two_explicit_copies(kind: str, extras: bool, tail: int, n_sinks: int) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    visible, mask, window = _visible(kind, 23)
    softcap = 1.5 if extras else None
    s_aux = (
        torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if extras else None
    )
    if s_aux is not None:
        s_aux.requires_grad_()
    got: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    # 1000 scores: a chunk of 3 queries, so that every kind of chunk border occurs.
    plan = TwoSidedPlan(tail, n_sinks, on_backward=lambda *args: got.append(args), max_scores=1000)
    out = two_sided_attention(
        q, k, v, plan, layer_idx=7, attention_mask=mask, softcap=softcap, s_aux=s_aux, sliding_window=window
    )
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [q, k, v] + ([s_aux] if s_aux is not None else [])
    grads = torch.autograd.grad((out * weight).sum(), leaves)

    k_near, k_far, v_near, v_far = (x.detach().clone().requires_grad_() for x in (k, k, v, v))
    expected = _reference(q, k_near, v_near, k_far, v_far, visible, plan, softcap, s_aux)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    copies = [q, k_near, k_far, v_near, v_far] + ([s_aux] if s_aux is not None else [])
    dq, dk_near, dk_far, dv_near, dv_far, *d_aux = torch.autograd.grad((expected * weight).sum(), copies)
    ((layer, k_seen, v_seen, dk_got, dv_got),) = got
    assert layer == 7
    for value, wanted in (
        (k_seen, k.detach()),
        (v_seen, v.detach()),
        (dk_got, dk_far),
        (dv_got, dv_far),
        (grads[0], dq),
        (grads[1], dk_near + dk_far),
        (grads[2], dv_near + dv_far),
        *zip(grads[3:], d_aux, strict=True),
    ):
        torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0)
    assert not dk_got.requires_grad


def test_gradcheck() -> None:
    q, k, v = (x[:1, :, :5, :3].clone().requires_grad_() for x in _inputs())
    plan = TwoSidedPlan(2, 1, on_backward=lambda *args: None, max_scores=100)
    assert torch.autograd.gradcheck(
        lambda *x: two_sided_attention(*x, plan, layer_idx=0, softcap=2.0), (q, k, v), atol=1e-6
    )


@pytest.mark.parametrize(("n_q", "n_k"), [(23, 23), (1, 23), (6, 23)])
def test_coded_attention_equals_a_loop_over_queries(n_q: int, n_k: int) -> None:
    q, k, v = _inputs(n_q, n_k)
    k_hat, v_hat = k.round(), (v * 2).round() / 2
    plan = TwoSidedPlan(
        5,
        2,
        code_keys=lambda layer, x: x.round(),
        code_values=lambda layer, x: (x * 2).round() / 2,
        max_scores=1000,
    )
    got = two_sided_attention(q, k, v, plan, layer_idx=0)
    for b in range(2):
        for h in range(6):
            for i in range(n_q):
                q_pos = n_k - n_q + i
                keys, values = [], []
                for j in range(q_pos + 1):
                    is_far = q_pos - j >= 5 and j >= 2
                    keys.append((k_hat if is_far else k)[b, h // 2, j])
                    values.append((v_hat if is_far else v)[b, h // 2, j])
                p = (torch.stack(keys) @ q[b, h, i] * 8**-0.5).softmax(dim=0)
                torch.testing.assert_close(got[b, h, i], p @ torch.stack(values), atol=1e-12, rtol=0)


def test_coding_only_keys_or_only_values_leaves_the_other_exact() -> None:
    q, k, v = _inputs()
    visible = torch.ones(23, 23, dtype=torch.bool).tril()
    for name, copies in (("code_keys", (k.round(), v)), ("code_values", (k, v.round()))):
        plan = TwoSidedPlan(5, 2, **{name: lambda layer, x: x.round()})
        got = two_sided_attention(q, k, v, plan, layer_idx=0)
        torch.testing.assert_close(got, _reference(q, k, v, *copies, visible, plan, None, None))


def test_a_row_that_sees_nothing_gives_zeros_and_no_nan() -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    mask = torch.ones(23, 23, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 0, :] = False
    out = two_sided_attention(q, k, v, TwoSidedPlan(5, 2), layer_idx=0, attention_mask=mask)
    assert (out[:, :, 0] == 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", TINY_NAMES)
@torch.no_grad()
def test_identity_coding_equals_the_stock_model(name: str) -> None:
    model = tiny(name)
    if name in EAGER:
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    layers: list[int] = []
    plan = TwoSidedPlan(
        8,
        2,
        code_keys=lambda layer, k: k,
        code_values=lambda layer, v: layers.append(layer) or v,
        max_scores=8000,
    )
    for attention_mask in (None, mask):
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
        expected = model(**kwargs).logits
        with two_sided(model, plan) as inputs:
            assert model.config._attn_implementation == (ATTENTION_NAME if name in EAGER else before)
            got = model(**{**kwargs, **inputs()}).logits
        assert model.config._attn_implementation == before
        seen = mask.bool() if attention_mask is not None else slice(None)
        torch.testing.assert_close(got[seen], expected[seen], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model(**kwargs).logits, expected, atol=0, rtol=0)
    assert layers == list(range(model.config.num_hidden_layers)) * 2


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_of_an_encoder_decoder_only_the_decoders_own_attention_is_coded(name: str) -> None:
    model = tiny(name)
    generator = torch.Generator().manual_seed(1)
    ids, encoded = (torch.randint(3, VOCAB, (2, n), generator=generator) for n in (60, 25))
    given = {"input_ids": encoded, "decoder_input_ids": ids}
    seen: list[tuple[int, int]] = []

    def code(layer: int, keys: Tensor) -> Tensor:
        seen.append((layer, keys.shape[2]))
        return keys

    expected = model(**given, use_cache=False).logits
    with two_sided(model, TwoSidedPlan(8, 2, code_keys=code)) as inputs:
        got = model(**given, **inputs()).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert seen == [(0, 60), (1, 60)]


def test_the_old_attention_comes_back_after_an_error_and_plans_nest() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    ids = torch.arange(3, 23)[None]
    seen: list[str] = []
    outer = TwoSidedPlan(4, 1, on_forward=lambda *args: seen.append("outer"))
    inner = TwoSidedPlan(4, 1, on_forward=lambda *args: seen.append("inner"))
    with pytest.raises(RuntimeError, match="stop"), two_sided(model, outer) as of_outer:
        with two_sided(model, inner) as of_inner:
            model(ids, **of_inner())
        model(ids, **of_outer())
        raise RuntimeError("stop")
    assert seen == ["inner"] * 2 + ["outer"] * 2
    assert model.config._attn_implementation == before
    model(ids, use_cache=False)
    assert len(seen) == 4


def test_what_cannot_work_is_an_error() -> None:
    q, k, v = _inputs()
    with pytest.raises(ShapeError, match="do not fit"):
        two_sided_attention(q[:, :5], k, v, TwoSidedPlan(), layer_idx=0)
    with pytest.raises(ShapeError, match="queries"):
        two_sided_attention(q, k[:, :, :9], v[:, :, :9], TwoSidedPlan(), layer_idx=0)
    with pytest.raises(ShapeError, match="layer 3"):
        two_sided_attention(q, k, v, TwoSidedPlan(code_keys=lambda layer, x: x[..., 1:]), layer_idx=3)
    with pytest.raises(ShapeError, match="negative"):
        TwoSidedPlan(tail=-1)
    with pytest.raises(CalibrationError, match="not both"):
        TwoSidedPlan(on_backward=lambda *args: None, code_keys=lambda layer, x: x)
    model = tiny("gpt2").train()
    with pytest.raises(CalibrationError, match="eval"), two_sided(model, TwoSidedPlan()) as inputs:
        model(torch.arange(3, 13)[None], **inputs())


def test_attention_by_another_function_is_named() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    with (
        pytest.raises(ModelError, match=r"'eager' and not by torch's .*attn_implementation='sdpa'"),
        two_sided(model, TwoSidedPlan()) as inputs,
    ):
        model(torch.arange(3, 13)[None], **inputs())


def _passes(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, plan: TwoSidedPlan
) -> tuple[Tensor, ...]:
    """One layer with this attention, under a plan: its output and the gradients of its inputs."""

    class OneLayer(torch.nn.Module):
        config = transformers.LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa")

        def forward(self, past_key_values: Any, use_cache: bool) -> Tensor:
            return attention(q, *past_key_values.update(k, v, 0))

    with two_sided(OneLayer(), plan) as inputs:  # type: ignore[arg-type]
        out = OneLayer()(**inputs())
    return out, *torch.autograd.grad(out.square().sum(), (q, k, v))


@pytest.mark.parametrize(
    ("arrange", "repeated"),
    [
        ("interleaved", lambda x: x.repeat_interleave(2, 1)),
        ("tiled", lambda x: x.repeat(1, 2, 1, 1)),
        ("gqa", lambda x: x),
    ],
)
def test_heads_are_found_however_they_are_repeated(
    arrange: str, repeated: Callable[[Tensor], Tensor]
) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    seen: list[tuple[Tensor, ...]] = []
    plan = TwoSidedPlan(5, 2, on_backward=lambda layer, *rest: seen.append(rest))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # An odd head's scores get something added, so that a mask goes with its head.
        mask = torch.zeros(6, 23, 23, dtype=q.dtype)
        mask[1::2] += torch.linspace(0, 1, 23, dtype=q.dtype)
        hidden = torch.ones(23, 23, dtype=torch.bool).triu(1)
        mask = mask.masked_fill(hidden, -math.inf)
        return torch.nn.functional.scaled_dot_product_attention(
            q, repeated(k), repeated(v), mask, enable_gqa=arrange == "gqa"
        )

    got = _passes(attention, q, k, v, plan)
    out = attention(q, k, v)
    expected = out, *torch.autograd.grad(out.square().sum(), (q, k, v))
    for given, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-10, rtol=1e-9)
    ((_, _, dk_far, _),) = seen
    assert dk_far.shape == k.shape and dk_far.abs().sum() > 0


def test_a_layer_that_shares_keys_counts_for_their_owner() -> None:
    """The far gradient is that of both readers, by autograd on a far copy of its own for all pairs."""
    q, k, v = (x.requires_grad_() for x in _inputs())
    seen: list[tuple[Tensor, ...]] = []
    plan = TwoSidedPlan(0, 0, on_backward=lambda layer, *rest: seen.append((layer, *rest)))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        own = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        return own + sdpa(own, k, v, is_causal=True, enable_gqa=True)

    got = _passes(attention, q, k, v, plan)
    out = attention(q, k, v)
    expected = out, *torch.autograd.grad(out.square().sum(), (q, k, v))
    for given, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-10, rtol=1e-9)
    ((layer, _, _, dk_far, dv_far),) = seen
    assert layer == 0
    torch.testing.assert_close(dk_far, expected[2], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(dv_far, expected[3], atol=1e-10, rtol=1e-9)


def test_keys_that_are_changed_before_attention_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, 2 * k, v, is_causal=True, enable_gqa=True)

    with pytest.raises(ModelError, match="layer 0 is given other keys"):
        _passes(attention, q, k, v, TwoSidedPlan())
