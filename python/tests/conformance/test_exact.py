"""Exact mode: with identity compressors every behaviour gives the tokens and logits of the stock cache."""

from __future__ import annotations

import pytest
import torch

from behaviours import BEHAVIOURS, own, stock_outcome
from families import FAMILIES, Family

CELLS = [(family, name) for family in FAMILIES for name in BEHAVIOURS if name not in family.not_applicable]
REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError)


@pytest.mark.parametrize(
    ("family", "behaviour"), CELLS, ids=[f"{family.name}-{behaviour}" for family, behaviour in CELLS]
)
def test_exact(family: Family, behaviour: str) -> None:
    run = BEHAVIOURS[behaviour]
    if behaviour in family.upstream_refuses:
        with pytest.raises((*REFUSALS, AssertionError)):
            run(family, family.stock_cache)
        with pytest.raises(REFUSALS):
            run(family, family.exact_cache)
        return
    expected, given = stock_outcome(family.name, behaviour), run(family, family.exact_cache)
    assert torch.equal(given.tokens, expected.tokens)
    if given.must_equal is not None:
        assert torch.equal(given.tokens, given.must_equal)
    if given.logits is not None:
        assert torch.isfinite(given.logits).all()
        torch.testing.assert_close(given.logits, expected.logits, rtol=1e-4, atol=1e-4)
    if given.cache is not None:
        assert own(given.cache).get_memory_stats()["compressed_tokens"] == 0
        assert given.cache.get_seq_length() == expected.cache.get_seq_length()
