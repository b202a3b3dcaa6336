"""What transformers' own generation and cache tests exercise, as functions of a family and a kind of cache.

Named after the tests of `GenerationTesterMixin` and `test_cache_utils` that they follow; the release ships neither.
Each returns tokens and, where upstream looks at them, logits. In exact mode both must be those of the stock cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from cache_helpers import tokens
from families import BY_NAME, Family
from tiny_models import tiny

NEW_TOKENS = 8
PROMPT_TOKENS = 40

MakeCache = Callable[[], Cache]


@dataclass(frozen=True)
class Outcome:
    """What a behaviour gave.

    Attributes:
        tokens: [B, T].
        logits: any shape; None where only tokens count.
        must_equal: what ``tokens`` must be when nothing is lossy, by upstream's test: greedy tokens for assisted
            decoding, say.
        cache: the cache after it, where one is left.
    """

    tokens: Tensor
    logits: Tensor | None = None
    must_equal: Tensor | None = None
    cache: Cache | None = None


def generate(family: Family, ids: Tensor, cache: Cache, **kwargs: Any) -> Any:
    """`model.generate` with a fixed seed and a fixed length, because lengths are compared."""
    torch.manual_seed(3)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
    settings.setdefault("max_new_tokens", NEW_TOKENS)
    settings["min_new_tokens"] = settings["max_new_tokens"]
    if family.is_encoder_decoder:
        # What is held compressed is what the decoder reads.
        settings |= {"attention_mask": None, "decoder_input_ids": ids}
        ids = _encoded(ids)
    return family.model.generate(ids, past_key_values=cache, **settings)


def _encoded(ids: Tensor) -> Tensor:
    """What an encoder reads while its decoder reads these tokens."""
    return tokens(20, seed=8, batch=ids.shape[0])


def feed(family: Family, cache: Cache, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one forward pass of the decoder."""
    if family.is_encoder_decoder:
        kwargs = {"input_ids": _encoded(ids), "decoder_input_ids": ids, **kwargs}
    else:
        kwargs["input_ids"] = ids
    with torch.no_grad():
        return family.model(past_key_values=cache, use_cache=True, **kwargs).logits


def own(cache: Cache) -> Any:
    """The cache of self-attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _dict_outcome(given: Any, cache: Cache) -> Outcome:
    return Outcome(given.sequences, torch.stack(given.logits), cache=cache)


_DICT = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def greedy(family: Family, make: MakeCache) -> Outcome:
    cache = make()
    return Outcome(generate(family, tokens(PROMPT_TOKENS), cache), cache=cache)


def greedy_dict_outputs(family: Family, make: MakeCache) -> Outcome:
    cache = make()
    given = generate(family, tokens(PROMPT_TOKENS, batch=2), cache, **_DICT)
    assert given.past_key_values is cache
    return _dict_outcome(given, cache)


def sample(family: Family, make: MakeCache) -> Outcome:
    settings = {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 2}
    return Outcome(generate(family, tokens(PROMPT_TOKENS), make(), **settings))


def sample_dict_outputs(family: Family, make: MakeCache) -> Outcome:
    cache = make()
    return _dict_outcome(
        generate(family, tokens(PROMPT_TOKENS, batch=2), cache, do_sample=True, **_DICT), cache
    )


def beam_search(family: Family, make: MakeCache) -> Outcome:
    return Outcome(generate(family, tokens(PROMPT_TOKENS, batch=2), make(), num_beams=3))


def beam_search_dict_outputs(family: Family, make: MakeCache) -> Outcome:
    cache = make()
    given = generate(family, tokens(PROMPT_TOKENS), cache, num_beams=3, num_return_sequences=2, **_DICT)
    return Outcome(given.sequences, given.sequences_scores, cache=cache)


def beam_sample(family: Family, make: MakeCache) -> Outcome:
    return Outcome(
        generate(family, tokens(PROMPT_TOKENS), make(), num_beams=3, do_sample=True, temperature=1.5)
    )


def _greedy_reference(family: Family, ids: Tensor) -> Tensor:
    return generate(family, ids, family.stock_cache())


def _noisy_copy(family: Family) -> Any:
    """An assistant that is right often, and wrong often."""
    assistant = copy.deepcopy(family.model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return assistant


def assisted_greedy(family: Family, make: MakeCache) -> Outcome:
    ids, cache = tokens(PROMPT_TOKENS), make()
    given = generate(family, ids, cache, assistant_model=_noisy_copy(family))
    return Outcome(given, must_equal=_greedy_reference(family, ids), cache=cache)


def assisted_sample(family: Family, make: MakeCache) -> Outcome:
    assistant = tiny("llama", num_hidden_layers=1)
    return Outcome(generate(family, tokens(PROMPT_TOKENS), make(), assistant_model=assistant, do_sample=True))


def prompt_lookup(family: Family, make: MakeCache) -> Outcome:
    ids, cache = tokens(10).repeat(1, 4), make()
    given = generate(family, ids, cache, prompt_lookup_num_tokens=4)
    return Outcome(given, must_equal=_greedy_reference(family, ids), cache=cache)


def continue_from_past(family: Family, make: MakeCache) -> Outcome:
    """Four new tokens, then four more from the same cache, are eight in one go."""
    cache, ids = make(), tokens(PROMPT_TOKENS, batch=2)
    first = generate(family, ids, cache, max_new_tokens=NEW_TOKENS // 2)
    assert cache.get_seq_length() == first.shape[1] - 1  # the last token has not been fed yet
    given = generate(family, first, cache, max_new_tokens=NEW_TOKENS - NEW_TOKENS // 2)
    return Outcome(given, must_equal=_greedy_reference(family, ids), cache=cache)


def left_padding(family: Family, make: MakeCache) -> Outcome:
    """Logits of a padded prompt, row by row those of the prompt alone."""
    ids = tokens(PROMPT_TOKENS, batch=2)
    mask = torch.ones_like(ids)
    ids[1, :11], mask[1, :11] = 0, 0
    cache = make()
    given = generate(family, ids, cache, attention_mask=mask, **_DICT)
    alone = generate(family, ids[1:, 11:], make(), **_DICT)
    logits = torch.stack(given.logits)
    # The first step, because later ones differ as soon as two tokens are nearly as likely.
    assert (logits[0, 1] - alone.logits[0][0]).abs().max() <= 0.15 * logits[0, 1].std()
    return Outcome(given.sequences, logits, cache=cache)


def chunked_prefill(family: Family, make: MakeCache) -> Outcome:
    ids = tokens(PROMPT_TOKENS)
    given = generate(family, ids, make(), prefill_chunk_size=7)
    return Outcome(given, must_equal=_greedy_reference(family, ids))


def from_inputs_embeds(family: Family, make: MakeCache) -> Outcome:
    ids, cache = tokens(PROMPT_TOKENS), make()
    embeddings = family.model.get_input_embeddings()(ids)
    given = generate(family, ids, cache, inputs_embeds=embeddings, **_DICT)
    return _dict_outcome(given, cache)


def past_key_values_format(family: Family, make: MakeCache) -> Outcome:
    """Every layer shows keys and values [B, H, T, D]; of a sliding window at most its past tokens."""
    cache = make()
    ids = tokens(PROMPT_TOKENS, batch=2)
    logits = feed(family, cache, ids)
    assert own(cache).get_seq_length() == PROMPT_TOKENS
    reference = family.stock_cache()
    feed(family, reference, ids)
    assert len(own(cache).layers) == len(own(reference).layers)
    for layer, stock in zip(own(cache).layers, own(reference).layers, strict=True):
        if getattr(stock, "keys", None) is None:
            continue
        assert layer.keys.shape == stock.keys.shape
        assert layer.values.shape == stock.values.shape
        assert layer.keys.dtype == stock.keys.dtype
        assert layer.get_mask_sizes(3) == stock.get_mask_sizes(3)
    assert own(cache).is_sliding == own(reference).is_sliding
    return Outcome(logits.argmax(-1), logits, cache=cache)


def cache_copy(family: Family, make: MakeCache) -> Outcome:
    """A prefilled prompt, a copy of it for each of two questions."""
    prefilled = make()
    prompt = tokens(PROMPT_TOKENS)
    feed(family, prefilled, prompt)
    given = []
    for seed in (1, 2):
        branch = copy.deepcopy(prefilled)
        given.append(feed(family, branch, tokens(6, seed=seed)))
    assert own(prefilled).get_seq_length() == PROMPT_TOKENS
    logits = torch.cat(given)
    return Outcome(logits.argmax(-1), logits, cache=branch)


def cache_crop(family: Family, make: MakeCache) -> Outcome:
    """Tokens that were fed and removed again leave no trace."""
    cache, untouched = make(), make()
    prompt, wrong, right = tokens(PROMPT_TOKENS), tokens(5, seed=1), tokens(6, seed=2)
    for each in (cache, untouched):
        each.activate_past_recording()
        feed(family, each, prompt)
        each.crop(0)
    feed(family, cache, wrong)
    cache.crop(-wrong.shape[1])
    assert own(cache).get_seq_length() == PROMPT_TOKENS
    logits, expected = feed(family, cache, right), feed(family, untouched, right)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    return Outcome(logits.argmax(-1), logits, cache=cache)


def cache_reorder(family: Family, make: MakeCache) -> Outcome:
    """Beams: rows are picked, repeated and dropped."""
    cache = make()
    feed(family, cache, tokens(PROMPT_TOKENS, batch=3))
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    logits = feed(family, cache, tokens(5, seed=1, batch=3))
    return Outcome(logits.argmax(-1), logits, cache=cache)


def token_by_token(family: Family, make: MakeCache) -> Outcome:
    """One token at a time, well past every window: what the cache holds is what attention needs."""
    cache = make()
    ids = tokens(70, batch=2)
    parts = [feed(family, cache, ids[:, :50])]
    parts += [feed(family, cache, each) for each in ids[:, 50:].split(1, dim=1)]
    logits = torch.cat(parts, dim=1)
    return Outcome(logits.argmax(-1), logits, cache=cache)


BEHAVIOURS: dict[str, Callable[[Family, MakeCache], Outcome]] = {
    function.__name__: function
    for function in (
        greedy,
        greedy_dict_outputs,
        sample,
        sample_dict_outputs,
        beam_search,
        beam_search_dict_outputs,
        beam_sample,
        assisted_greedy,
        assisted_sample,
        prompt_lookup,
        continue_from_past,
        left_padding,
        chunked_prefill,
        from_inputs_embeds,
        past_key_values_format,
        cache_copy,
        cache_crop,
        cache_reorder,
        token_by_token,
    )
}


@functools.cache
def stock_outcome(family_name: str, behaviour: str) -> Outcome:
    """What the stock cache gives; computed once for exact and compressed mode."""
    family = BY_NAME[family_name]
    return BEHAVIOURS[behaviour](family, family.stock_cache)
