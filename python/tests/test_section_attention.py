"""Attention over expanded sections through torch's kernel: against dense attention in float64, on any processor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from cache_helpers import compressed_cache, expanded, model_of, random_kv, stream_compressor, tokens
from kvlathe.errors import CacheStateError
from kvlathe.stores import Policy, make_store, sections
from kvlathe.stores.native import NativeStore

HEADS, DIM = 2, 16
SCALING = DIM**-0.5


@pytest.fixture(autouse=True)
def short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that cut blocks, and several of them in a short text; on every processor, from one query on."""
    monkeypatch.setattr(sections, "_MOST_TOKENS", 21)
    monkeypatch.setattr(sections, "_LEAST_TOKENS", 13)
    monkeypatch.setattr(sections, "_MOST_SCORES", 400)
    monkeypatch.setattr(sections, "_MIN_QUERIES", 1)
    monkeypatch.setattr(sections, "on_amx", lambda: True)


def store_of(n_tokens: int, batch: int, dtype: torch.dtype) -> NativeStore:
    keys, values = random_kv(n_tokens, batch=batch, heads=HEADS, dim=DIM, dtype=dtype)
    store = make_store(
        stream_compressor(side="key"), stream_compressor(side="value"), Policy(2, 0, 11), keys, values
    )
    assert isinstance(store, NativeStore)
    store.append(keys, values)
    store.compress()
    assert store.n_coded > 0
    return store


def queries_of(n_queries: int, batch: int, group: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n_queries)
    return (3 * torch.randn(batch, group * HEADS, n_queries, DIM, generator=generator)).to(dtype)


def causal(n_queries: int, n_tokens: int) -> Tensor:
    return torch.ones(n_queries, n_tokens, dtype=torch.bool).tril(n_tokens - n_queries)[None, None]


def dense(store: NativeStore, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q·k·scaling)·v in float64, zeros where nothing is seen: [B, q, Hq, D]; and the log of the sum."""
    n_tokens = store.n_tokens
    keys, values = (states.double() for states in store.read(0, n_tokens, n_tokens=n_tokens))
    group = queries.shape[1] // HEADS
    scores = SCALING * queries.double() @ keys.repeat_interleave(group, 1).mT
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ values.repeat_interleave(group, 1)).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize(("n_queries", "n_tokens"), [(1, 90), (5, 90), (60, 140), (90, 90)])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "holes"])
def test_it_is_attention(group: int, n_queries: int, n_tokens: int, mask: str) -> None:
    store = store_of(n_tokens, 2, torch.float32)
    queries = queries_of(n_queries, 2, group, torch.float32)
    seen = causal(n_queries, n_tokens)
    if mask == "padding":
        seen = seen.repeat(2, 1, 1, 1)
        # Longer than a section; queries that are padding themselves see nothing.
        seen[1, ..., :40] = False
    if mask == "holes":
        seen = seen & (torch.arange(n_tokens) % 7 != 3)
        seen[..., n_queries // 2, :] = False

    given = None if mask == "none" else seen
    got, lse = sections.attend(store, queries, HEADS, n_tokens=n_tokens, mask=given, scaling=SCALING)
    assert got.is_contiguous() and got.dtype == queries.dtype
    expected, expected_lse = dense(store, queries, seen)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    store = store_of(140, 2, torch.bfloat16)
    queries = queries_of(60, 2, 3, torch.bfloat16)
    got, _ = store.attend(queries, n_tokens=140, mask=None, scaling=SCALING)
    expected, _ = dense(store, queries, causal(60, 140))
    # Keys and values are those of the cache to the bit; weights and sections are rounded to 8 bits.
    assert (got.double() - expected).abs().max() < 2**-7 * expected.abs().max()


def test_it_serves_many_queries_in_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_MIN_QUERIES", 12)
    assert sections.pays(queries_of(4, 1, 3, torch.bfloat16), HEADS)
    assert not sections.pays(queries_of(3, 1, 3, torch.bfloat16), HEADS)
    assert not sections.pays(queries_of(4, 1, 3, torch.float32), HEADS)
    assert not sections.pays(queries_of(4, 1, 3, torch.float16), HEADS)


def test_what_torch_has_no_kernel_for_goes_the_native_way(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(90, 1, torch.bfloat16)
    queries = queries_of(20, 1, 2, torch.bfloat16)
    monkeypatch.setattr(sections, "attend", lambda *_, **__: pytest.fail("not here"))
    for option in ({"softcap": 20.0}, {"sink_scores": torch.zeros(2 * HEADS)}):
        assert store.attend(queries, n_tokens=90, mask=None, scaling=SCALING, **option).out.isfinite().all()


def test_a_cache_that_changed_meanwhile_is_refused() -> None:
    store = store_of(90, 1, torch.bfloat16)
    with pytest.raises(CacheStateError, match="another thread"):
        store.attend(queries_of(20, 1, 2, torch.bfloat16), n_tokens=89, mask=None, scaling=SCALING)


def test_a_forced_instruction_set_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    for forced, expected in (("avx2", False), ("", torch.backends.mkldnn.is_available())):
        monkeypatch.setenv("KVLATHE_ISA", forced)
        sections.on_amx.cache_clear()
        assert sections.on_amx() is expected
    sections.on_amx.cache_clear()


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("padding", [0, 9])
def test_a_model_reads_its_prompt_through_it(
    name: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks behind a first one, left padding and a window included: logits as through expanded tensors."""
    model = copy.deepcopy(model_of(name)).to(torch.bfloat16)
    ids, mask = tokens(120, batch=2), torch.ones(2, 120, dtype=torch.long)
    mask[1, :padding] = 0
    attend, calls = sections.attend, []
    monkeypatch.setattr(
        sections, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs)
    )

    @torch.no_grad()
    def logits() -> Tensor:
        cache = compressed_cache(name)
        cache.note_padding(mask)
        outputs = [
            model(
                input_ids=ids[:, start : start + 40],
                attention_mask=mask[:, : start + 40],
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, start : start + 40],
                past_key_values=cache,
            ).logits
            for start in (0, 40, 80)
        ]
        return torch.cat(outputs, 1)

    with expanded():
        expected = logits()
    assert not calls
    got = logits()
    assert len(calls) == 2 * model.config.num_hidden_layers
    got, expected = got[:, padding:].float(), expected[:, padding:].float()
    # A code of bfloat16's rounding that falls to the other side moves single logits more than most.
    assert (got - expected).norm() < 0.015 * expected.norm()
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
