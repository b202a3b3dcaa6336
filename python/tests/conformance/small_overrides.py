"""What a field's name does not tell: settings of small configs, by the config's model type."""

from __future__ import annotations

from typing import Any

VOCAB = 128

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# For a head_dim of 16.
_MULTI_AXIS_ROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_MULTI_AXIS = {"rope_parameters": _MULTI_AXIS_ROPE}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]

# A mapping stands for fields of a config within the config.
OVERRIDES: dict[str, dict[str, Any]] = {
    # Layers: all kinds that the type has, where its defaults show one only, or say it in a way of their own.
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": dict.fromkeys(_SLIDING_AND_FULL, _MULTI_AXIS_ROPE),
    },
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_AND_FULL * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # Its layers of attention share weights, which it looks for in at least two of them.
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # Sizes that must fit each other.
    "dots3_note_text": {
        "per_layer_config": {
            2: {"head_dim": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
        }
    },
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [32, 64],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
    },
    "glm4v_text": _MULTI_AXIS,
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen2_5_vl_text": _MULTI_AXIS,
    "qwen2_vl_text": _MULTI_AXIS,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xlstm": {"hidden_size": 128},
    # Sizes whose names say nothing.
    "blip-2": {"num_query_tokens": 4, "image_token_index": 100},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "mllama_vision_model": {"image_size": 56},
    "longcat_flash": {"zero_expert_num": 2},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    # Settings without which the type does not run.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "xmod": {"default_language": "en_XX"},
}

# Types that do not generate by themselves.
_DRAFTS = "drafts for another model, whose keys and values it reads"
NOT_ALONE: dict[str, str] = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}
