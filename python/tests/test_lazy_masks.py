"""What a mask shows is found once for the layers that share it, and again whenever it has changed."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from kvlathe.cache.padding import PaddedRows
from kvlathe.lazy import PassMemo, causal_mask
from kvlathe.lazy.masks import ALL, CAUSAL, Sight, sight
from test_lazy_sdpa import Pair, queries_of


def seen(mask: Tensor | None, n_queries: int, n_tokens: int, window: int | None = None) -> Sight | None:
    return sight(mask, False, PassMemo(), batch=2, n_queries=n_queries, n_tokens=n_tokens, window=window)


def test_causal_masks_by_their_definition() -> None:
    for n_queries, n_tokens, window in [(1, 5, None), (4, 9, None), (4, 9, 3), (9, 9, 4), (2, 2, 1)]:
        mask = causal_mask(n_queries, n_tokens, window=window)
        for query in range(n_queries):
            place = n_tokens - n_queries + query
            expected = [t <= place and place - t < (window or math.inf) for t in range(n_tokens)]
            assert mask[query].tolist() == expected
        part = causal_mask(n_queries, n_tokens, window=window, first=1, end=n_tokens - 1)
        assert torch.equal(part, mask[:, 1:-1])


@pytest.mark.parametrize("additive", [None, -math.inf, torch.finfo(torch.float32).min])
def test_masks_that_say_nothing_are_none(additive: float | None) -> None:
    def given(mask: Tensor) -> Tensor:
        return mask if additive is None else torch.zeros(mask.shape).masked_fill(~mask, additive)

    plain = torch.ones(4, 9, dtype=torch.bool)
    assert seen(given(plain), 4, 9) is ALL
    assert seen(given(causal_mask(4, 9)), 4, 9) is CAUSAL
    assert seen(given(causal_mask(4, 9))[None, None].expand(2, 6, 4, 9), 4, 9) is CAUSAL
    assert seen(given(causal_mask(4, 9, window=6)), 4, 9, window=6) is CAUSAL
    # Causal, but for a layer with a window it hides too little.
    found = seen(given(causal_mask(4, 9)), 4, 9, window=6)
    assert found is not None and found.kind == "masked"
    assert torch.equal(found.mask[0, 0], causal_mask(4, 9))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3, 4, 9, dtype=torch.bool).tril(),
        torch.ones(3, 1, 4, 9, dtype=torch.bool),
        torch.ones(4, 8, dtype=torch.bool),
        torch.ones(3, 9, dtype=torch.bool),
        torch.randn(4, 9),
        torch.full((4, 9), math.nan),
        torch.full((4, 9), math.inf),
        torch.full((4, 9), torch.finfo(torch.float32).min),
        torch.ones(4, 9, dtype=torch.int64),
        torch.zeros(4, 9, requires_grad=True),
        torch.ones(1, 1, 1, 4, 9, dtype=torch.bool),
    ],
    ids=["a head", "rows", "tokens", "queries", "bias", "nan", "inf", "all hidden", "ints", "graph", "five"],
)
def test_masks_that_are_torchs_business(mask: Tensor) -> None:
    assert seen(mask, 4, 9) is None


def test_a_mask_that_has_changed_is_looked_at_again() -> None:
    calls: list[int] = []
    memo = PassMemo()

    def find(tensor: Tensor, *more: int) -> int:
        return memo.find(total, tensor, *more)

    def total(tensor: Tensor, *_: int) -> int:
        calls.append(1)
        return int(tensor.sum())

    mask = torch.ones(1, 1, 4, 9)
    assert [find(mask) for _ in range(3)] == [36] * 3 and len(calls) == 1
    # A view that looks the same is the same; another one is not.
    assert find(mask[:, :, :, :9]) == 36 and len(calls) == 1
    assert find(mask[..., 1:]) == 32 and find(mask.transpose(2, 3)) == 36 and len(calls) == 3
    mask[0, 0, 0, 0] = 0
    assert find(mask) == 35 and find(mask, 7) == 35 and len(calls) == 5
    other = torch.ones(1, 1, 4, 9)
    assert find(other) == 36 and find(mask) == 35 and len(calls) == 6
    assert find(mask.requires_grad_()) == 35 and len(calls) == 7


def test_masks_are_not_kept_alive() -> None:
    memo = PassMemo()
    mask = torch.ones(2, 1, 4, 9, dtype=torch.bool)
    mask[0, ..., :3] = False
    held = weakref.ref(mask)
    found = sight(mask, False, memo, batch=2, n_queries=4, n_tokens=9, window=None)
    assert found is not None and found.mask is not None and found.mask.data_ptr() == mask.data_ptr()
    del mask, found
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("change", ["numpy", "data", "inference"])
def test_what_is_written_between_passes_past_torchs_counts(change: str) -> None:
    """The next pass looks again."""
    with torch.inference_mode(change == "inference"):
        array = np.ones((1, 1, 1, 61), dtype=bool)
        mask = torch.from_numpy(array) if change == "numpy" else torch.ones(1, 1, 1, 61, dtype=torch.bool)
        for _ in range(2):
            pair = Pair(1)
            pair.check(queries_of(6, 1), enable_gqa=True, attn_mask=mask)
            if change == "numpy":
                array[..., :40] = False
            elif change == "data":
                mask.data[..., :40] = False
            else:
                mask[..., :40] = False


def test_in_inference_mode() -> None:
    """Tensors count no versions there, and views know no base."""
    with torch.inference_mode():
        mask = torch.ones(2, 1, 4, 9, dtype=torch.bool)
        assert seen(mask, 4, 9) is ALL
        assert seen(mask & causal_mask(4, 9), 4, 9) is CAUSAL


def test_padding_is_read_off_the_first_passs_mask() -> None:
    lengths, n_tokens = [0, 3, 9], 9
    real = torch.stack([torch.arange(n_tokens) >= n for n in lengths])
    mask = causal_mask(n_tokens, n_tokens)[None, None] & real[:, None, None, :]
    expected = PaddedRows(tuple(lengths), n_tokens)
    lowest = torch.finfo(torch.bfloat16).min
    for given in (
        mask,
        mask.expand(-1, 4, -1, -1),
        torch.zeros(mask.shape).masked_fill(~mask, -math.inf),
        torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, lowest),
    ):
        assert PaddedRows.of_first_pass(given, 3, n_tokens) == expected
    # What is no mask of the first tokens alone tells nothing.
    assert PaddedRows.of_first_pass(mask[..., :5], 3, n_tokens) is None
    assert PaddedRows.of_first_pass(mask[:2], 3, n_tokens) is None
    one_for_all = causal_mask(n_tokens, n_tokens)
    assert PaddedRows.of_first_pass(one_for_all, 3, n_tokens) == PaddedRows((0,), n_tokens)
