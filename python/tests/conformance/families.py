"""The model families of the matrix: a tiny random model of each, and what it is expected to do.

What is expected is stated here and checked by the run, so that the table in `docs/models.md` cannot drift: a family
that starts or stops working fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from cache_helpers import compressed_cache, identity_cache, model_of


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        name: of the tiny model (`tiny_models`).
        title: for people.
        what: what is special about its cache or its attention.
        calibrates: whether `calibrate` accepts it, so that its cache can be compressed.
        is_served: whether attention reads packed blocks, attached where it is eager.
        upstream_refuses: behaviours that transformers itself refuses for this family, or gets wrong, with its own
            cache; ours must refuse them.
        not_applicable: behaviours that mean nothing for this family.
        overrides: settings of the tiny model.
    """

    name: str
    title: str
    what: str
    calibrates: bool = True
    is_served: bool = True
    upstream_refuses: frozenset[str] = frozenset()
    not_applicable: frozenset[str] = frozenset()
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        return model_of(self.name, **self.overrides)

    @property
    def keeps_states(self) -> bool:
        """Whether layers keep states of linear attention or of convolutions."""
        return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=self.model.config).layers)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _for_the_model(self, cache: Cache) -> Cache:
        return EncoderDecoderCache(cache, DynamicCache()) if self.is_encoder_decoder else cache

    def stock_cache(self) -> Cache:
        """What `generate` makes by itself."""
        return self._for_the_model(DynamicCache(config=self.model.config))

    def exact_cache(self) -> Cache:
        """Ours with identity compressors."""
        return self._for_the_model(identity_cache(self.model))

    def coded_cache(self, bits: float = 6.0, tail: int = 8) -> Cache:
        """Ours with a calibrated preset."""
        return self._for_the_model(compressed_cache(self.name, bits, tail, **self.overrides))


_NO_ROLLBACK = frozenset({"assisted_greedy", "assisted_sample", "prompt_lookup", "cache_crop"})
# Nor does `generate` of some give them embeddings.
_NO_EMBEDS = _NO_ROLLBACK | {"from_inputs_embeds"}
# Their prompt is the encoder's.
_DECODERS_ONLY = frozenset(
    {"from_inputs_embeds", "left_padding", "chunked_prefill", "continue_from_past"}
) | {
    "assisted_sample"  # its assistant is a decoder
}


def _hybrid(name: str, title: str, what: str, **expected: Any) -> Family:
    """A family with recurrent states, which nobody can roll back."""
    return Family(name, title, what, **{"upstream_refuses": _NO_ROLLBACK, **expected})


FAMILIES: tuple[Family, ...] = (
    Family("llama", "Llama", "RoPE in halves, grouped heads"),
    Family("mistral", "Mistral", "every layer has a sliding window"),
    Family("qwen2", "Qwen2", "key biases"),
    Family("qwen3", "Qwen3", "normalised keys, head_dim of its own"),
    Family("qwen3_moe", "Qwen3-MoE", "experts"),
    Family("gemma2", "Gemma 2", "sliding and full layers in turn, soft cap"),
    Family(
        "gemma3",
        "Gemma 3",
        "sliding and full layers, two RoPE bases, head_dim 256",
        overrides={
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    Family("phi3", "Phi-3", "RoPE on part of a head"),
    Family("phi3_longrope", "Phi-3, long context", "longrope"),
    Family("gpt2", "GPT-2", "learned positions, no RoPE"),
    Family("gpt_neox", "GPT-NeoX, Pythia", "RoPE on a quarter of a head"),
    Family("glm", "GLM", "interleaved RoPE on half of a head"),
    Family("gpt_oss", "gpt-oss", "learned sinks, YaRN, sliding and full layers"),
    Family("stablelm", "StableLM", "RoPE on part of a head"),
    Family("cohere", "Cohere", "interleaved RoPE"),
    Family("smollm3", "SmolLM3", "some layers without RoPE"),
    Family("olmo2", "OLMo 2", "keys normalised over all heads"),
    Family("granite", "Granite", "scaled attention and residuals"),
    Family("llama4", "Llama 4", "chunked attention, layers without RoPE"),
    Family("falcon", "Falcon", "attention code of its own"),
    Family("gemma3n", "Gemma 3n", "layers that share keys and values"),
    Family("gemma4", "Gemma 4", "shared keys and values, heads of two sizes, components without rotation"),
    Family("lfm2", "LFM2", "convolutions and attention"),
    _hybrid("qwen3_next", "Qwen3-Next", "linear attention and attention"),
    _hybrid("qwen3_5", "Qwen3.5", "linear attention and attention"),
    _hybrid("granitemoehybrid", "Granite 4", "Mamba and attention"),
    _hybrid("bamba", "Bamba", "Mamba and attention", upstream_refuses=_NO_EMBEDS),
    _hybrid(
        "jamba",
        "Jamba",
        "Mamba and attention",
        upstream_refuses=_NO_ROLLBACK - {"cache_crop"},
        # Its states are not read where several tokens come at once.
        not_applicable=frozenset({"chunked_prefill", "cache_crop"}),
    ),
    _hybrid(
        "nemotron_h",
        "Nemotron-H",
        "Mamba, attention, and layers that cache nothing",
        upstream_refuses=_NO_EMBEDS,
    ),
    _hybrid("falcon_h1", "Falcon-H1", "Mamba and attention in every layer", upstream_refuses=_NO_EMBEDS),
    _hybrid(
        "zamba2",
        "Zamba 2",
        "Mamba everywhere, attention with shared weights in some layers",
        upstream_refuses=_NO_EMBEDS,
    ),
    Family("deepseek_v3", "DeepSeek-V2, V3", "multi-head latent attention", calibrates=False),
    Family(
        "t5",
        "T5",
        "encoder-decoder, position bias",
        is_served=False,
        not_applicable=_DECODERS_ONLY,
    ),
    Family("bart", "BART", "encoder-decoder", not_applicable=_DECODERS_ONLY),
)
BY_NAME = {family.name: family for family in FAMILIES}
