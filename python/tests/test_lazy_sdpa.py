"""Attention over lazy keys and values honours the whole contract of torch's SDPA, from the blocks or not.

What is right is what SDPA gives for the same keys and values as ordinary tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache_helpers import random_kv, stream_compressor
from kvlathe.cache.expansions import Expansions
from kvlathe.cache.layer import CompressedLayer
from kvlathe.errors import ExpandedWarning
from kvlathe.lazy import LazyStates, attend
from kvlathe.stores import Policy

BATCH, KV_HEADS, DIM = 2, 2, 16
WINDOW = 24


def layer_of(window: int | None = None, n_sinks: int = 4) -> CompressedLayer:
    sides = [stream_compressor(bits=8.0, side=side) for side in ("key", "value")]
    if window is not None:
        return CompressedLayer(*sides, Policy(n_sinks, 0, 8, window))
    return CompressedLayer(*sides, Policy(n_sinks, 0, 8))


class Pair:
    """Lazy keys and values after ``n_past`` tokens and ``n_new`` more, and what they stand for."""

    def __init__(
        self,
        n_new: int,
        n_past: int = 60,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
    ) -> None:
        self.layer, self.expansions = layer_of(window), Expansions()
        self.layer.update(*random_kv(n_past, batch=batch, dtype=dtype))
        new = random_kv(n_new, batch=batch, seed=1, dtype=dtype)
        twin = self.layer.__deepcopy__({})
        self.dense = twin.update(*new)
        self.keys, self.values = self.layer.hand_out(*new, self.expansions, 0)
        assert isinstance(self.keys, LazyStates) and self.keys.shape == self.dense[0].shape
        self.n_tokens = self.keys.shape[2]

    def check(
        self,
        queries: Tensor,
        *,
        view: Callable[[Tensor], Tensor] = lambda states: states,
        served: bool = True,
        **kwargs: Any,
    ) -> None:
        """SDPA over both gives the same, and lazily is served from the blocks or not, as expected."""
        expected = F.scaled_dot_product_attention(queries, *(view(states) for states in self.dense), **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpandedWarning)
            got = F.scaled_dot_product_attention(queries, view(self.keys), view(self.values), **kwargs)
        assert type(got) is Tensor and got.dtype == expected.dtype and got.shape == expected.shape
        tolerance = 2e-3 if got.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
        assert self.expansions.n_layers == (0 if served else 1)


def queries_of(heads: int, n_queries: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(heads + n_queries)
    return torch.randn(batch, heads, n_queries, DIM, generator=generator).to(dtype)


def repeat_kv(states: Tensor) -> Tensor:
    """As transformers does it."""
    batch, heads, n_tokens, dim = states.shape
    states = states[:, :, None, :, :].expand(batch, heads, 3, n_tokens, dim)
    return states.reshape(batch, heads * 3, n_tokens, dim)


def causal(n_queries: int, n_tokens: int) -> Tensor:
    return torch.ones(n_queries, n_tokens, dtype=torch.bool).tril(n_tokens - n_queries)


@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("window", [None, WINDOW])
class TestHeads:
    def test_as_many_query_heads_as_kv_heads(self, n_new: int, window: int | None) -> None:
        Pair(n_new, window=window).check(queries_of(KV_HEADS, n_new))

    def test_grouped_heads(self, n_new: int, window: int | None) -> None:
        Pair(n_new, window=window).check(queries_of(6, n_new), enable_gqa=True)

    @pytest.mark.parametrize(
        "view",
        [
            repeat_kv,
            lambda states: states.repeat_interleave(3, dim=1),
            lambda states: torch.repeat_interleave(states, dim=1, repeats=3),
            lambda states: states.repeat(1, 3, 1, 1),
            lambda states: states.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2),
            lambda states: (
                states.contiguous()[:, :, None]
                .expand(-1, -1, 3, -1, -1)
                .reshape(states.shape[0], -1, *states.shape[2:])
            ),
            lambda states: (
                states[:, None].expand(-1, 3, -1, -1, -1).reshape(states.shape[0], 6, *states.shape[2:])
            ),
        ],
        ids=["repeat_kv", "interleave", "torch.interleave", "repeat", "unsqueeze", "contiguous", "in front"],
    )
    def test_repeated_heads(self, n_new: int, window: int | None, view: Callable[[Tensor], Tensor]) -> None:
        Pair(n_new, window=window).check(queries_of(6, n_new), view=view)

    def test_uneven_heads_go_dense(self, n_new: int, window: int | None) -> None:
        def some(states: Tensor) -> Tensor:
            return torch.cat([states, states[:, :1]], dim=1)

        Pair(n_new, window=window).check(queries_of(3, n_new), view=some, served=False)


def test_packed_query_heads() -> None:
    """transformers' `pack_gqa`: a group's heads stand as queries, and share a mask's one row."""
    mask = torch.rand(BATCH, 1, 1, 61, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., -1] = True
    Pair(1).check(queries_of(KV_HEADS, 3), attn_mask=mask)
    Pair(1).check(queries_of(KV_HEADS, 3))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("additive", ["bool", "inf", "lowest"])
def test_masks(window: int | None, n_new: int, rows: int, dims: int, per_query: bool, additive: str) -> None:
    """Bool and additive, broadcast in every dimension. SDPA takes one of three dimensions as [heads, q, tokens]."""
    pair = Pair(n_new, window=window)
    shape = (rows, 1, n_new if per_query else 1, pair.n_tokens)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., -1] = True
    mask = mask if dims == 4 else mask[0] if dims == 3 else mask[0, 0]
    if additive != "bool":
        lowest = -math.inf if additive == "inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    pair.check(queries_of(6, n_new), enable_gqa=True, attn_mask=mask)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_hides_nothing_and_what_is_causal(window: int | None) -> None:
    n_new = 7
    for make in (
        lambda n: None,
        lambda n: torch.ones(n_new, n, dtype=torch.bool),
        lambda n: causal(n_new, n),
        lambda n: causal(n_new, n)[None, None].expand(BATCH, 6, -1, -1),
        lambda n: causal(n_new, n) & ~causal(n_new, n).tril(n - n_new - WINDOW),
        lambda n: torch.ones(n_new, 1, dtype=torch.bool),
    ):
        pair = Pair(n_new, window=window)
        pair.check(queries_of(6, n_new), enable_gqa=True, attn_mask=make(pair.n_tokens))


@pytest.mark.parametrize("n_new", [1, 7])
def test_is_causal_counts_from_the_first_token(n_new: int) -> None:
    """torch's rule, of little use with a cache, is kept all the same."""
    Pair(n_new).check(queries_of(6, n_new), enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("scale", [None, 0.5, 0.0, -0.2])
def test_scale(scale: float | None) -> None:
    Pair(3).check(queries_of(2, 3), scale=scale)


@pytest.mark.parametrize(
    "mask",
    [
        lambda n: torch.rand(BATCH, 6, 3, n, generator=torch.Generator().manual_seed(0)) < 0.7,
        lambda n: torch.rand(1, 1, 3, n, generator=torch.Generator().manual_seed(0)),
        lambda n: torch.zeros(3, n).masked_fill(~causal(3, n), torch.finfo(torch.float32).min / 3),
    ],
    ids=["a mask a head", "a bias", "hides half"],
)
def test_masks_that_packed_tokens_do_not_serve(mask: Callable[[int], Tensor]) -> None:
    pair = Pair(3)
    pair.check(queries_of(6, 3), enable_gqa=True, attn_mask=mask(pair.n_tokens), served=False)


def test_rows_that_see_nothing_are_zero() -> None:
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[1] = False
    pair = Pair(3)
    got = F.scaled_dot_product_attention(queries_of(2, 3), pair.keys, pair.values, attn_mask=mask)
    assert got[:, :, 1].eq(0).all() and got[:, :, ::2].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats(dtype: torch.dtype) -> None:
    Pair(3, dtype=dtype).check(queries_of(6, 3, dtype=dtype), enable_gqa=True)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_in_any_of_the_three(which: int) -> None:
    """With ordinary keys or values beside, too."""
    pair, queries = Pair(3), queries_of(2, 3)
    gradients = []
    for keys, values in (pair.dense, (pair.keys, pair.values)):
        given = [queries, keys, values]
        if which:
            given[which] = pair.dense[which - 1]
        given[which] = given[which].clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpandedWarning)
            F.scaled_dot_product_attention(*given).square().sum().backward()
        gradients.append(given[which].grad)
    torch.testing.assert_close(*gradients)


def test_dropout_goes_dense() -> None:
    pair = Pair(3)
    outputs = []
    for keys, values in (pair.dense, (pair.keys, pair.values)):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpandedWarning)
            outputs.append(F.scaled_dot_product_attention(queries_of(2, 3), keys, values, dropout_p=0.5))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("queries", "kwargs"),
    [
        (queries_of(2, 3, dtype=torch.float16), {}),
        (queries_of(5, 3), {"enable_gqa": True}),
        (queries_of(3, 3), {}),
        (queries_of(2, 3)[..., :8], {}),
        (queries_of(2, 3), {"attn_mask": torch.ones(3, 50, dtype=torch.bool)}),
        (queries_of(2, 3), {"attn_mask": torch.ones(3, 63, dtype=torch.bool), "is_causal": True}),
    ],
    ids=["dtype", "groups", "heads", "dim", "mask", "both"],
)
def test_what_torch_refuses_is_refused(queries: Tensor, kwargs: dict[str, Any]) -> None:
    pair = Pair(3)
    try:
        F.scaled_dot_product_attention(queries, *pair.dense, **kwargs)
    except RuntimeError as error:
        expected = error
    else:
        pytest.skip(f"torch {torch.__version__} takes it")
    with pytest.raises(RuntimeError) as got, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpandedWarning)
        F.scaled_dot_product_attention(queries, pair.keys, pair.values, **kwargs)
    assert str(got.value) == str(expected)


def test_keys_and_values_that_do_not_belong_together() -> None:
    first, second, queries = Pair(3), Pair(3, n_past=60, batch=BATCH), queries_of(2, 3)
    for given, dense in (
        ((first.keys, second.values), (first.dense[0], second.dense[1])),
        ((first.values, first.keys), (first.dense[1], first.dense[0])),
        ((first.keys, first.keys), (first.dense[0], first.dense[0])),
        ((first.keys, first.dense[1]), first.dense),
        ((first.dense[0], first.values), first.dense),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpandedWarning)
            got = F.scaled_dot_product_attention(queries, *given)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(queries, *dense), atol=1e-5, rtol=1e-5)


def test_autocast_gives_its_own_format() -> None:
    """Rotated keys are float32 there, values bfloat16; both are held, and SDPA returns bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer, expansions = layer_of(), Expansions()
        keys, values = random_kv(60)
        layer.update(keys, values.bfloat16())
        new_keys, new_values = random_kv(2, seed=1)
        twin = layer.__deepcopy__({})
        dense = twin.update(new_keys, new_values.bfloat16())
        lazy = layer.hand_out(new_keys, new_values.bfloat16(), expansions, 0)
        assert [states.dtype for states in (*dense, *lazy)] == [torch.float32, torch.bfloat16] * 2
        queries = queries_of(2, 2, batch=1)
        expected, got = (F.scaled_dot_product_attention(queries, *states) for states in (dense, lazy))
    assert got.dtype == expected.dtype == torch.bfloat16 and expansions.n_layers == 0
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("n_queries", [1, 2, 5, 90])
@pytest.mark.parametrize("kind", ["none", "causal", "row", "per query", "is_causal"])
def test_queries_that_are_not_those_of_the_new_tokens(window: int | None, n_queries: int, kind: str) -> None:
    """Fewer, as where a model drops some, or more, as in attention to a prefix."""
    pair = Pair(4, window=window)
    n = pair.n_tokens
    shown = torch.ones(n_queries, n, dtype=torch.bool).tril(max(0, n - n_queries))
    random = torch.rand(n_queries, n, generator=torch.Generator().manual_seed(0)) < 0.7
    random[:, 0] = True
    kwargs = {
        "none": {},
        "causal": {"attn_mask": shown},
        "row": {"attn_mask": random[:1]},
        "per query": {"attn_mask": random},
        "is_causal": {"is_causal": True},
    }[kind]
    queries = queries_of(6, n_queries)
    expected = F.scaled_dot_product_attention(queries, *pair.dense, enable_gqa=True, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpandedWarning)
        got = F.scaled_dot_product_attention(queries, pair.keys, pair.values, enable_gqa=True, **kwargs)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


def test_queries_that_are_not_what_lies_in_memory() -> None:
    queries = queries_of(2, 3)
    Pair(3).check(torch._neg_view(queries))
    pair = Pair(3)
    # torch 2.6 itself goes by what happens to lie there.
    expected = F.scaled_dot_product_attention(torch.zeros(queries.shape), *pair.dense)
    zeros = torch._efficientzerotensor(queries.shape)
    got = F.scaled_dot_product_attention(zeros, pair.keys, pair.values)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    layer = layer_of()
    keys, values = random_kv(9)
    given, _ = layer.update(torch._neg_view(keys), values)
    assert torch.equal(given, -keys)
    assert layer.keys is not None and torch.equal(layer.keys, -keys)


def test_transforms_of_functions() -> None:
    """torch.func, forward-mode gradients and traces want operations, not numbers."""
    queries = queries_of(2, 3)

    def check(transform: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
        pair = Pair(3)
        expected = transform(lambda q: F.scaled_dot_product_attention(q, *pair.dense))
        got = transform(lambda q: F.scaled_dot_product_attention(q, pair.keys, pair.values))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def tangent(function: Callable[[Tensor], Tensor]) -> Tensor:
        # Only torch's plain kernel knows these gradients.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            out = function(forward_ad.make_dual(queries, torch.ones_like(queries)))
            found = forward_ad.unpack_dual(out).tangent
        assert found is not None
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(lambda f: torch.vmap(f)(queries[:, None]))
        check(lambda f: torch.func.grad(lambda q: f(q).sum())(queries))
        check(lambda f: torch.func.functionalize(f)(queries))
        check(lambda f: make_fx(f)(queries)(queries))
        check(lambda f: torch.jit.trace(f, (queries,))(queries))
        check(tangent)


def test_another_function_in_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler's, say, that calls it."""
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs))
    Pair(3).check(queries_of(2, 3))


def test_sinks_follow_their_heads() -> None:
    """`attend` knows a score a query head beside the others, in whatever order heads are repeated."""
    pair, queries, sinks = Pair(1), queries_of(6, 1), torch.randn(6)
    keys, values = (states.repeat(1, 3, 1, 1) for states in pair.dense)
    scores = torch.cat([queries @ keys.mT / 4, sinks.view(1, 6, 1, 1).expand(BATCH, 6, 1, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ values
    lazy = [states.repeat(1, 3, 1, 1) for states in (pair.keys, pair.values)]
    got = attend(queries, *lazy, sink_scores=sinks)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
