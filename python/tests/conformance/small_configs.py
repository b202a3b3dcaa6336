"""Small configs of any model of transformers, filled in by what a field is called.

A config is a dataclass whose defaults are some published model's: sizes are replaced by small ones, lists with an entry
a layer by a few of their entries, so that every kind of layer is still there, and configs within it likewise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from small_overrides import OVERRIDES, VOCAB

# Special tokens of composite models (images, audio) go here; no prompt has them.
FIRST_SPECIAL = 100
HEADS, KV_HEADS = 4, 2
MAX_LAYERS = 4

# What a field's name says it counts, and how many there are in a small model. The first that fits counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size_per_layer_input", 8),
    (r"(moe|expert|experts)_.*(intermediate|hidden)_size|expert_ffn_hidden_size", 32),
    (
        r".*(intermediate|ffn|inner|feed_forward|mlp)_?(hidden)?_?(size|dim).*|n_inner|d_inner|dff|d_ff|dim_ff",
        96,
    ),
    (
        r".*hidden_size|.*hidden_dim|d_model|n_embd|emb_dim|.*embed_proj_dim|(input_|output_)?embedding_size",
        64,
    ),
    (
        r"embed_dim|projection_dim|lru_width|.*projector_dim|.*(in|out|input|output)_(dim|size)|.*channels?",
        64,
    ),
    (r".*vocab_size.*|n_words|n_token", VOCAB),
    (r".*head_dim|kv_channels|d_kv|dim_head|d_head|attention_head_size", 16),
    (r".*(key_value|kv).*heads", KV_HEADS),
    (r".*heads?", HEADS),
    (r"rotary_dim", 8),
    (r".*lora_rank|.*state_size|.*d_state", 16),
    (r"num_.*experts|n_routed_experts|moe_num_experts", 4),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r"sliding_window|sliding_window_size|window_size|attention_window_size|attention_chunk_size", 24),
    (r"max_source_positions", 32),
    (r"max_position_embeddings|n_positions|max_seq_len|model_max_length|n_ctx|context_length", 512),
)
_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_blocks")
_SPECIAL = re.compile(r".*token_(id|index)|forced_.*_id")
# None would stand for a number that depends on sizes which are no longer what they were.
_NEEDED = {"num_key_value_heads", "head_dim"}
# Encoders such as BERT decode when told so. A model whose output is its input repeats its last token whatever it has
# read.
_SWITCHES = {"is_decoder": True, "tie_word_embeddings": False}


def small_config(
    config_class: type[PreTrainedConfig], kv_heads: int = KV_HEADS, overrides: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A small config of this class.

    Args:
        kv_heads: for types whose KV heads must be as many as their heads.
        overrides: what the config within which this one stands wants otherwise.
    """
    wanted = {**OVERRIDES.get(config_class.model_type, {}), **(overrides or {})}
    default = config_class()
    values = vars(default)
    layers = _layers_to_keep(default)
    settings: dict[str, Any] = {}
    n_special = 0
    for field in dataclasses.fields(config_class):
        name, declared = field.name, field.default
        value = values.get(name)
        if isinstance(value, PreTrainedConfig):
            settings[name] = small_config(type(value), kv_heads, wanted.pop(name, None))
        elif layers is not None and _has_an_entry_a_layer(value, default):
            settings[name] = [value[at] for at in layers]
        elif name in _SWITCHES:
            settings[name] = _SWITCHES[name]
        elif declared is None and name in _NEEDED:
            settings[name] = _small(name, 2**20, kv_heads)
        elif isinstance(declared, bool) or not isinstance(declared, int):
            continue
        elif _LAYERS.fullmatch(name):
            settings[name] = 2 if layers is None else len(layers)
        elif _SPECIAL.fullmatch(name):
            if declared >= FIRST_SPECIAL:
                settings[name] = FIRST_SPECIAL + n_special
                n_special += 1
        else:
            settings[name] = _small(name, declared, kv_heads)
    per_layer = getattr(values.get("_heterogeneity_spec"), "per_layer_overrides", {})
    if per_layer and layers is not None:
        settings["per_layer_config"] = {
            n: {name: _other(name, value, settings) for name, value in per_layer[at].items()}
            for n, at in enumerate(layers)
            if at in per_layer
        }
    return config_class(**{**settings, **wanted})


def _small(name: str, value: int, kv_heads: int) -> int:
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
    return min(kv_heads if size == KV_HEADS and name.endswith("heads") else size, value)


def _other(name: str, value: Any, settings: dict[str, Any]) -> Any:
    """What differs between layers is to go on doing so."""
    return 2 * settings[name] if isinstance(value, int) and name in settings else value


def _n_layers(config: PreTrainedConfig) -> int | None:
    n_layers = getattr(config, "num_hidden_layers", None)
    return n_layers if isinstance(n_layers, int) else None


def _has_an_entry_a_layer(value: Any, config: PreTrainedConfig) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != _n_layers(config):
        return False
    # Indices of layers tell nothing about them.
    return list(value) != list(range(len(value)))


def _layers_to_keep(config: PreTrainedConfig) -> list[int] | None:
    """Indices of layers of which no two are alike in all lists that have an entry a layer, then of the last ones."""
    n_layers = _n_layers(config)
    if n_layers is None:
        return None
    lists = [value for value in vars(config).values() if _has_an_entry_a_layer(value, config)]
    first: dict[str, int] = {}
    for at in range(n_layers):
        first.setdefault(repr([entries[at] for entries in lists]), at)
    kept = sorted(first.values())[:MAX_LAYERS]
    spare = [at for at in reversed(range(n_layers)) if at not in kept]
    return sorted(kept + spare[: max(0, 2 - len(kept))])
