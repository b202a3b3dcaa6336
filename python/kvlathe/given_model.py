"""The model that a user gives, as an object: what is inside a wrapper, whether it can be calibrated and judged, where
its inputs go, and its modes while it is measured.

Nothing here asks for a class by name: wrappers (PEFT, DistributedDataParallel, `torch.compile`) are looked into, a
head is known by what comes out of it, and offloaded weights by the hooks that bring them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from .errors import ModelError


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that was given, or the one inside a wrapper. Adapters stay in it.

    Raises:
        ModelError: there is none.
    """
    modules: Iterator[nn.Module] = model.modules() if isinstance(model, nn.Module) else iter(())
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ModelError(
            f"got a {type(model).__name__}, expected a transformers model or a wrapper around one; load it with "
            "AutoModelForCausalLM.from_pretrained or kvlathe.load_model"
        )
    return found


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not there. Those that hooks bring when they are needed (accelerate's offloading
    to the CPU or to disk) are.

    Raises:
        ModelError: weights on the meta device that nothing brings.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has no weights: {len(missing)} of its parameters, such as {missing[0]}, are on "
            "the meta device and no hook of accelerate's brings them; load the model with from_pretrained"
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its inputs. Offloaded weights lie on no device: the hooks that bring them move the inputs,
    from wherever they are."""
    device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def plain_tokens(model: PreTrainedModel, n_tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [n_tokens] on the CPU, none of which stands for something else than text (an image, say)."""
    config = model.config.get_text_config(decoder=True)
    named = {**config.to_dict(), **model.config.to_dict()}
    special = [value for name, value in named.items() if name.endswith(("_token_id", "_token_index"))]
    plain = torch.ones(int(config.vocab_size))
    plain[[value for value in special if isinstance(value, int) and 0 <= value < len(plain)]] = 0
    generator = torch.Generator().manual_seed(seed)
    return plain.multinomial(n_tokens, replacement=True, generator=generator)


def reads_text(model: PreTrainedModel) -> bool:
    """Whether token ids are all that a pass needs. An encoder of sounds or images wants something else."""
    return not model.config.is_encoder_decoder or model.main_input_name == "input_ids"


def decoder_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What makes the model's decoder read these tokens [B, T], on the model's device. An encoder, where there is one,
    reads the same text: its decoder's own attention is what a cache of ours holds.
    """
    ids = ids.to(input_device(model))
    return (
        {"input_ids": ids, "decoder_input_ids": ids}
        if model.config.is_encoder_decoder
        else {"input_ids": ids}
    )


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """A cache of the decoder's own attention, as the model's forward and its `generate` take it: ``past_key_values``,
    or since transformers 5.24 ``cache``; of an encoder-decoder with a cache for its cross-attention beside it.
    """
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
    takes = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in takes and "past_key_values" not in takes else "past_key_values": cache}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside the ``with`` block; each module in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_predicts_tokens(model: PreTrainedModel) -> None:
    """Refuse a model that gives no logits of next tokens: a bare decoder, a classifier, a reward model.

    A head with as many outputs as the model has tokens is believed; otherwise what two tokens give decides.

    Raises:
        ModelError: with what to load instead.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == rows:
        return
    logits: Any = None
    given = "no logits"
    ids = torch.arange(2)[None] % rows
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = getattr(model(**decoder_inputs(model, ids), use_cache=False), "logits", None)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        given = f"an error ({error})"
    if isinstance(logits, Tensor):
        given = f"logits of shape {tuple(logits.shape)}"
        if logits.dim() == 3 and logits.shape[:2] == ids.shape and logits.shape[2] >= rows:
            return
    raise ModelError(
        f"{type(model).__name__} does not predict tokens: two of them give {given}, expected logits of shape "
        f"(1, 2, {rows}). Load the language model with this decoder, by AutoModelForCausalLM; a preset that is "
        "calibrated on that serves this model, too"
    )
