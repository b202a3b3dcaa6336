"""Tiny random models, one per attention and RoPE variant that the tests need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 512,
    "factor": 4.0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
_TWO_TYPES = ["sliding_attention", "full_attention"] * 2

_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}

# name -> (config class, model class, settings that differ from _COMMON; None removes one)
_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _YARN}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16, "sliding_window": 48}),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            "sliding_window": None,
        },
    ),
    "phi3_longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 512,
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 1.0},
            "sliding_window": None,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            # transformers 5.20 would take SDPA and leave the soft cap out; later releases choose this themselves.
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
            "layer_types": _TWO_TYPES,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"num_key_value_heads": None, "intermediate_size": None, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "glm": (
        "GlmConfig",
        "GlmForCausalLM",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]},
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": _TWO_TYPES[:2],
            "rope_parameters": _YARN,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 24,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 1,
        },
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "num_key_value_heads": None,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "multi_query": False,
            "alibi": False,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "sliding_window": 24,
            "layer_types": [*_TWO_TYPES[:3:2], *_TWO_TYPES[1:]],
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 5,
            "laurel_rank": 8,
            "intermediate_size": [96] * 5,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 1,
            "sliding_window": 24,
            "layer_types": _TWO_TYPES,
            "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0, 1],
        },
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_MAMBA,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
        },
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {**_MAMBA, "mamba_d_ssm": 128}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "mamba_d_state": 16,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "mamba_headdim": 32,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 8,
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **{name: None for name in _COMMON if name not in ("vocab_size", "pad_token_id", "eos_token_id")},
        },
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "decoder_start_token_id": 2,
            **{name: None for name in _COMMON if name not in ("vocab_size", "pad_token_id", "eos_token_id")},
        },
    ),
}

# Models that cannot be calibrated; the conformance tests have them.
_EXACT_ONLY = frozenset({"deepseek_v3"})
ENCODER_DECODERS: tuple[str, ...] = ("t5", "bart")
# Models of which only some layers hold keys and values of their own.
PARTLY_CODED: tuple[str, ...] = (
    "gemma3n",
    "gemma4",
    "lfm2",
    "qwen3_next",
    "qwen3_5",
    "granitemoehybrid",
    "bamba",
    "falcon_h1",
    "jamba",
    "nemotron_h",
    "zamba2",
)
TINY_NAMES: tuple[str, ...] = tuple(
    name for name in _TINY if name not in {*_EXACT_ONLY, *ENCODER_DECODERS, *PARTLY_CODED}
)


def tiny(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in float32 and evaluation mode; the same weights for the same name and seed.

    Args:
        name: one of `TINY_NAMES`, `ENCODER_DECODERS`, `PARTLY_CODED`, or of those that cannot be calibrated.
        overrides: config settings that replace the usual ones.
    """
    config_name, model_name, changes = _TINY[name]
    settings = {key: value for key, value in {**_COMMON, **changes, **overrides}.items() if value is not None}
    if "sliding_window" in changes and changes["sliding_window"] is None:
        settings["sliding_window"] = None
    build: Callable[..., Any] = getattr(transformers, config_name)
    config = build(**settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, model_name)(config)
        with torch.no_grad():
            # The stock initialisation (0.02, zero biases) gives flat attention, on which nothing can be
            # tested.
            for parameter in model.parameters():
                spread = 0.15 if parameter.dim() > 1 else 0.1
                noise = torch.randn_like(parameter) * spread
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
            for module in model.modules():
                if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
                    module.sinks.copy_(torch.randn_like(module.sinks))
    finally:
        torch.random.set_rng_state(state)
    return model.float().eval()
