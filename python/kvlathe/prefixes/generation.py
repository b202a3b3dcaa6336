"""`PrefixStore.generate`: look up, generate, save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from ..cache import CompressedDynamicCache
from ..errors import ModelError, ShapeError
from ..given_model import cache_argument

if TYPE_CHECKING:
    from .store import PrefixStore

# What says nothing that the tokens do not.
_OF_TOKENS = ("input_ids", "attention_mask")


def generate(
    store: PrefixStore, model: PreTrainedModel, extra_key: str | bytes, inputs: dict[str, Any]
) -> Any:
    """See `PrefixStore.generate`."""
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} reads its prompt with an encoder, which has no cache; prefixes are of decoders"
        )
    ids = _prompt(inputs, extra_key)
    n_copies = _n_copies(model, inputs)
    cache, n_tokens = store.load(ids, model=model, extra_key=extra_key)
    if n_tokens and n_copies > 1:
        cache.batch_repeat_interleave(n_copies)
    with _recording(cache):
        generating: Any = model.generate
        output = generating(**inputs, **cache_argument(model, cache))
        sequences = output if isinstance(output, Tensor) else output.sequences
        if n_copies > 1:
            # Rows have changed places; of the prompt all of a group are the same.
            sequences = ids.repeat_interleave(n_copies, 0)
        if cache.get_seq_length() > sequences.shape[1] and n_copies == 1:
            raise ShapeError(
                f"the cache holds {cache.get_seq_length()} tokens and there are ids of {sequences.shape[1]}: something "
                f"else than tokens went into it, prompt tuning for example, and such prefixes are not stored"
            )
        store.save(sequences, cache, model=model, extra_key=extra_key)
    return output


def _prompt(inputs: dict[str, Any], extra_key: str | bytes) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ShapeError(
            "input_ids are missing, expected a tensor [B, T]: prefixes are found by their tokens"
        )
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise ShapeError(
            "the attention mask hides tokens: a padded batch has no common positions; give its sequences one by one"
        )
    others = [name for name, each in inputs.items() if isinstance(each, Tensor) and name not in _OF_TOKENS]
    if others and not extra_key:
        raise ShapeError(
            f"{', '.join(others)} may change keys and values, and tokens do not tell them apart; pass extra_key, a "
            f"hash of them for example"
        )
    return ids


def _n_copies(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    """Rows that `generate` makes of each of the prompt's."""
    config = inputs.get("generation_config") or model.generation_config

    def asked(name: str) -> int:
        given = inputs.get(name)
        given = given if given is not None else getattr(config, name, None)
        return int(given or 1)

    return max(asked("num_beams"), asked("num_return_sequences"))


@contextmanager
def _recording(cache: CompressedDynamicCache) -> Iterator[None]:
    """Keeps what windows drop until it is saved."""
    layers = [layer for layer in cache.layers if layer.is_sliding]
    for layer in layers:
        layer.activate_past_recording()
    try:
        yield
    finally:
        for layer in layers:
            layer.record_past = False
