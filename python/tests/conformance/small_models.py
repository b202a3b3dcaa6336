"""A small random model of every model type that transformers can generate with, for checks that need no weights.

What a type needs is found out by trying it: KV heads that are fewer than the heads if it takes them, weights with some
contrast if its logits stay finite, a `DynamicCache` if it takes one.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from kvlathe.given_model import cache_argument
from small_configs import FIRST_SPECIAL, HEADS, KV_HEADS, small_config
from small_overrides import NOT_ALONE

PROMPT_TOKENS = 40
_NO_CACHE = (Tensor, bool, int, float, str, dict, type(None))
# Of the matrices; transformers' own 0.02 gives flat attention, on which nothing can be tested.
SPREAD = 0.15
SEEDS = 5
TRIED_TOKENS = 8
# A model beyond this has a size that nobody made small.
MAX_PARAMETERS = 3_000_000
# Classes that take images or audio as well. Here they get text, and what they do not run without.
MULTIMODAL: tuple[str, ...] = (
    "AyaVisionForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "Florence2ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Phi4MultimodalForCausalLM",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VoxtralForConditionalGeneration",
    "WhisperForConditionalGeneration",
)


class NotBuilt(Exception):
    """Why there is no such model, or none that runs with transformers' own cache."""


class OwnCache(NotBuilt):
    """The model generates, but keeps what it has read in something else than a `DynamicCache`; says in what."""


@dataclass(frozen=True)
class Built:
    """A small model in float32 and evaluation mode.

    Attributes:
        name: a model type, or the class of a multimodal model.
        inputs: what `generate` needs besides ``past_key_values`` and a length.
    """

    name: str
    model: PreTrainedModel
    inputs: dict[str, Any]

    def stock_cache(self) -> Cache:
        """What `generate` makes by itself."""
        return self.for_the_model(DynamicCache(config=self.model.config))

    def for_the_model(self, cache: Cache) -> Cache:
        """A cache of self-attention, as `generate` takes it."""
        return EncoderDecoderCache(cache, DynamicCache()) if self.model.config.is_encoder_decoder else cache

    def generate(self, n_tokens: int, cache: Cache | None = None) -> Any:
        """So many greedy tokens, with logits and the cache."""
        # Not every model knows the name that transformers used until 5.23.
        given = {} if cache is None else cache_argument(self.model, cache)
        settings = {"max_new_tokens": n_tokens, "return_dict_in_generate": True, "output_logits": True}
        return self.model.generate(**self.inputs, **given, **settings)


def model_type_names() -> tuple[list[str], list[str]]:
    """Model types of causal models, and classes of multimodal ones that are not among them."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(causal), [
        name for name in MULTIMODAL if hasattr(transformers, name) and name not in causal.values()
    ]


def build(name: str) -> Built:
    """The model of that name; the same weights each time.

    Raises:
        NotBuilt: there is none, or none that runs with transformers' own cache.
    """
    if name in NOT_ALONE:
        raise NotBuilt(NOT_ALONE[name])
    failure: Exception | None = None
    with quiet(), torch.random.fork_rng(devices=[]):
        for spread in (SPREAD, None):
            for kv_heads in (KV_HEADS, HEADS):
                try:
                    return _lively(name, kv_heads, spread)
                except NotBuilt:
                    raise
                # Whatever a model finds wrong with its sizes, the next ones may suit it.
                except Exception as error:
                    failure = error
    assert failure is not None
    raise NotBuilt(sentence(failure)) from failure


def _lively(name: str, kv_heads: int, spread: float | None) -> Built:
    """The first of a few models that does not say the same whatever it has read; the last if all do."""
    for seed in range(SEEDS):
        built = _small(name, kv_heads, spread, seed)
        tokens = _try(built)
        if len(tokens.unique()) > 2:
            break
    return built


def sentence(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = [line.strip().partition(". ")[0] for line in str(error).splitlines()]
    said = next((line for line in lines if line and not line.endswith(":")), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and nothing printed: small configs are not what models expect."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _small(name: str, kv_heads: int, spread: float | None, seed: int) -> Built:
    if name in MULTIMODAL:
        model_class = getattr(transformers, name)
        config = small_config(model_class.config_class, kv_heads)
    else:
        config = small_config(CONFIG_MAPPING[name], kv_heads)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if not isinstance(config, model_class.config_class):
            config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in model_class._from_config(config).parameters())
    if n_parameters > MAX_PARAMETERS:
        raise NotBuilt(f"{n_parameters / 1e6:.0f} million parameters as built here")
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class._from_config(config).float().eval()
    if spread is not None:
        _enliven(model, spread)
    # Nothing but greedy tokens, as many as asked for.
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=2 if start is None else start,
        num_return_sequences=1,
    )
    return Built(name, model, _inputs(model))


@torch.no_grad()
def _enliven(model: PreTrainedModel, spread: float) -> None:
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(spread * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    for module in model.modules():
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            module.sinks.copy_(torch.randn_like(module.sinks))


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    # One row a codebook, of models that have an output for each.
    ids = torch.randint(3, FIRST_SPECIAL, (len(getattr(model, "lm_heads", [0])), PROMPT_TOKENS))
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.randn(1, config.num_mel_bins, frames)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids[:1])}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.roll(1, dims=1)
    pixels = inspect.signature(model.generate).parameters.get("pixel_values")
    if pixels is not None and pixels.default is inspect.Parameter.empty:
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(1, 3, size, size)
        ids[:, : config.num_query_tokens] = config.image_token_index
    return inputs


def _try(built: Built) -> Tensor:
    """A few tokens.

    Raises:
        OwnCache: the model has another cache than the one it is to be compared with.
        Exception: whatever else it does not like.
    """
    carried: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        carried.clear()
        carried.update(given)

    hook = built.model.register_forward_pre_hook(note, with_kwargs=True)
    own = built.generate(TRIED_TOKENS)
    hook.remove()
    if not torch.isfinite(torch.stack(own.logits)).all():
        raise ValueError("the logits are not finite")
    # What `generate` handed on from one step to the next.
    takes = inspect.signature(built.model.forward).parameters
    kept = [name for name, value in carried.items() if name in takes and not isinstance(value, _NO_CACHE)]
    what = ", ".join(f"{type(carried[name]).__name__} as {name}" for name in kept) or "none"
    cache = built.stock_cache()
    try:
        stock = built.generate(TRIED_TOKENS, cache)
    except Exception as error:
        raise OwnCache(what) from error
    if not torch.equal(stock.sequences, own.sequences):
        raise OwnCache(f"{what}; another outcome with a DynamicCache")
    if not _holds_tensors(cache):
        raise OwnCache(f"{what}; nothing is kept in a DynamicCache")
    return own.sequences[:, -TRIED_TOKENS:]


def _holds_tensors(cache: Any) -> bool:
    if isinstance(cache, EncoderDecoderCache):
        return _holds_tensors(cache.self_attention_cache)
    held = tree_leaves([vars(layer) for layer in cache.layers])
    return any(isinstance(value, Tensor) and value.numel() > 0 for value in held)
