"""The RoPE probe against what each tiny model is known to do."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from kvlathe.calibration.rope_frequencies import unwrapped_rate
from kvlathe.calibration.rope_probe import ModelShape, RopeProbe, probe_rope, rotate
from kvlathe.errors import ModelError
from tiny_models import tiny

# name -> (pairing, rotary_dim) per layer, None = not rotated
EXPECTED: dict[str, list[tuple[str, int] | None]] = {
    "llama": [("half_split", 16)] * 2,
    "llama_yarn": [("half_split", 16)] * 2,
    "qwen2": [("half_split", 16)] * 2,
    "qwen3": [("half_split", 32)] * 2,
    "mistral": [("half_split", 16)] * 2,
    "phi3": [("half_split", 24)] * 2,
    "phi3_longrope": [("half_split", 16)] * 2,
    "gemma2": [("half_split", 16)] * 2,
    "gemma3": [("half_split", 32)] * 4,
    "gpt2": [None] * 2,
    "gpt_neox": [("half_split", 8)] * 2,
    "glm": [("interleaved", 8)] * 2,
    "cohere": [("interleaved", 16)] * 2,
    "smollm3": [("half_split", 16), ("half_split", 16), None, ("half_split", 16)],
    "stablelm": [("half_split", 4)] * 2,
    "gpt_oss": [("half_split", 16)] * 2,
}


def _default_frequencies(theta: float, dim: int) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _summary(ropes: list[RopeProbe | None]) -> list[tuple[str, int] | None]:
    return [None if rope is None else (rope.pairing, rope.rotary_dim) for rope in ropes]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_of_every_variant(name: str) -> None:
    model = tiny(name)
    attention = model.config._attn_implementation
    result = probe_rope(model)
    assert _summary(result.ropes) == EXPECTED[name]
    assert all(rope is None or rope.residual < 1e-4 for rope in result.ropes)
    config = model.config
    n_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert result.shape.n_layers == config.num_hidden_layers
    assert (result.shape.n_heads, result.shape.n_kv_heads) == (config.num_attention_heads, n_kv_heads)
    assert bool(result.notes) == (name == "phi3_longrope")
    # Nothing is left behind on the model.
    assert model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "glm", "gemma3", "gpt_neox", "gpt2"])
def test_bfloat16(name: str) -> None:
    assert _summary(probe_rope(tiny(name).bfloat16()).ropes) == EXPECTED[name]


def test_frequencies() -> None:
    (rope, _) = probe_rope(tiny("qwen2")).ropes
    assert rope is not None
    torch.testing.assert_close(rope.inv_freq, _default_frequencies(1e6, 16), rtol=1e-6, atol=0)
    assert rope.inv_freq.dtype == torch.float64
    local, full, local_2, full_2 = probe_rope(tiny("gemma3")).ropes
    assert local is not None and full is not None and local_2 is not None and full_2 is not None
    torch.testing.assert_close(local.inv_freq, _default_frequencies(1e4, 32), rtol=1e-6, atol=0)
    torch.testing.assert_close(full.inv_freq, _default_frequencies(1e6, 32), rtol=1e-6, atol=0)
    assert torch.equal(local.inv_freq, local_2.inv_freq) and torch.equal(full.inv_freq, full_2.inv_freq)
    (yarn, _) = probe_rope(tiny("llama_yarn")).ropes
    assert yarn is not None
    assert torch.equal(yarn.inv_freq, tiny("llama_yarn").model.rotary_emb.inv_freq.double())


def test_huge_key_biases_hide_nothing() -> None:
    model = tiny("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[7::8] *= 1000  # the slowest pair, as in the real models
    assert _summary(probe_rope(model).ropes) == EXPECTED["qwen2"]


def test_a_model_without_frequency_buffers_is_measured() -> None:
    config = transformers.GPTJConfig(
        vocab_size=128,
        n_embd=64,
        n_head=4,
        n_layer=2,
        rotary_dim=8,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    result = probe_rope(transformers.GPTJForCausalLM(config))
    assert _summary(result.ropes) == [("interleaved", 8)] * 2
    assert result.ropes[0] is not None
    torch.testing.assert_close(result.ropes[0].inv_freq, _default_frequencies(1e4, 8), rtol=1e-4, atol=1e-7)
    assert result.shape == ModelShape(2, 4, 4, 16)


def test_a_rotation_handed_over_as_tables_only() -> None:
    """Frequencies that no buffer holds, found from the cos and sin that the layers get."""
    model = tiny("llama")
    rotary = model.model.rotary_emb
    wanted = _default_frequencies(321.0, 16)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * wanted.repeat(2)
        return (1.3 * angle.cos()).to(x.dtype), (1.3 * angle.sin()).to(x.dtype)

    rotary.forward = forward
    result = probe_rope(model)
    assert _summary(result.ropes) == EXPECTED["llama"] and result.notes == []
    assert result.ropes[0] is not None
    torch.testing.assert_close(result.ropes[0].inv_freq, wanted, rtol=1e-5, atol=1e-9)


def test_an_unknown_rotation_is_a_note_and_not_an_error() -> None:
    model = tiny("llama")

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (
            position_ids[..., None].float().square() * 0.37
            + torch.arange(16) * position_ids[..., None].sqrt()
        )
        return angle.cos(), angle.sin()

    model.model.rotary_emb.forward = forward
    result = probe_rope(model)
    assert result.ropes == [None, None]
    assert len(result.notes) == 2 and "layer 0" in result.notes[0]


def test_a_short_model_is_probed_within_its_positions() -> None:
    assert _summary(probe_rope(tiny("gpt2", max_position_embeddings=40)).ropes) == [None, None]
    assert _summary(probe_rope(tiny("llama", max_position_embeddings=100)).ropes) == EXPECTED["llama"]


def test_layers_of_different_sizes() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Linear(64, 64, bias=False)  # 4 value heads instead of 2
    attention.k_proj = torch.nn.Linear(64, 64, bias=False)
    attention.num_key_value_groups = 1
    result = probe_rope(model)
    assert [layer.sizes for layer in result.layers if layer is not None] == [(2, 16, 16), (4, 16, 16)]
    assert _summary(result.ropes) == EXPECTED["llama"]
    with pytest.raises(ModelError, match="differ"):
        _ = result.shape


@pytest.mark.parametrize("pairing", ["half_split", "interleaved"])
def test_rotate_turns_and_turns_back(pairing: str) -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    inv_freq = _default_frequencies(100.0, 8)
    positions = torch.tensor([0, 1, 2, 50, 1000])
    turned = rotate(x, positions, inv_freq, pairing)  # type: ignore[arg-type]
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.allclose(turned[:, 1:, :8], x[:, 1:, :8])
    torch.testing.assert_close(rotate(turned, -positions, inv_freq, pairing), x)  # type: ignore[arg-type]
    a, b = (0, 4) if pairing == "half_split" else (0, 1)
    angle = torch.atan2(turned[..., b], turned[..., a]) - torch.atan2(x[..., b], x[..., a])
    torch.testing.assert_close(angle.cos(), (positions * inv_freq[0]).cos().expand(3, 5))


def test_rates_are_unwrapped_across_a_gap() -> None:
    positions = torch.cat([torch.arange(64), torch.arange(1000, 1064)])
    rates = torch.tensor([1.0, 0.3, 1e-3, 1e-6, 0.0], dtype=torch.float64)
    z = torch.polar(torch.ones(128, 5, dtype=torch.float64), positions[:, None] * rates + 0.5)
    torch.testing.assert_close(unwrapped_rate(z, positions, 64), rates, rtol=1e-9, atol=1e-12)
