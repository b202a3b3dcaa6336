"""`attach`: eager attention from packed blocks, where a model cannot run SDPA; nothing else of a model is touched."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cache_helpers import compressed_cache, identity_cache, preset_of, tokens
from kvlathe import AttachWarning, CompressedDynamicCache, ExpandedWarning, attach, detach
from kvlathe.attachment import can_attach, is_attached
from tiny_models import tiny

EAGER = ["gemma2", "gpt_oss"]


def _forward(model: PreTrainedModel, cache: Any, ids: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, **kwargs)


def _expanded_layers(model: PreTrainedModel, name: str) -> int:
    """Layers that a step expands."""
    cache = compressed_cache(name)
    _forward(model, cache, tokens(60))
    _forward(model, cache, tokens(1))
    return int(cache.get_memory_stats()["expanded_layers"])


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore::kvlathe.errors.ExpandedWarning")
def test_attached_models_expand_nothing(name: str) -> None:
    model = tiny(name)
    assert can_attach(model) and _expanded_layers(model, name) == 2
    assert attach(attach(model)) is model and is_attached(model) and not can_attach(model)
    assert _expanded_layers(model, name) == 0
    assert detach(detach(model)) is model and not is_attached(model)
    assert _expanded_layers(model, name) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("kind", ["dynamic", "static", "identity"])
def test_other_caches_are_served_as_before(name: str, padding: int, kind: str) -> None:
    """To the bit: their attention is the module's own."""
    model = tiny(name, attn_implementation="eager")
    ids, mask = tokens(70, batch=2), torch.ones(2, 70, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def logits() -> Tensor:
        cache = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=80),
            "identity": lambda: identity_cache(model),
        }[kind]()
        parts = [(0, 30), (30, 50), (50, 51), (51, 70)]
        return torch.cat(
            [
                _forward(
                    model,
                    cache,
                    ids[:, start:end],
                    attention_mask=mask[:, :end] if padding else None,
                    position_ids=positions[:, start:end],
                ).logits
                for start, end in parts
            ],
            1,
        )

    expected = logits()
    attach(model)
    assert torch.equal(logits(), expected)


def test_models_on_sdpa_need_nothing_and_are_told_so() -> None:
    model = tiny("llama")
    before = dict(vars(model.model.layers[0].self_attn)), vars(model.config).copy(), dict(vars(model))
    with pytest.warns(
        AttachWarning, match=r"nothing to do.*scaled_dot_product_attention.*without attach\(\)"
    ):
        assert attach(model) is model
    assert not is_attached(model)
    assert before == (dict(vars(model.model.layers[0].self_attn)), vars(model.config), dict(vars(model)))


def test_attention_of_a_models_own_is_told() -> None:
    with pytest.warns(AttachWarning, match="code of its own"):
        attach(tiny("falcon", attn_implementation="eager"))


def test_nothing_but_the_served_modules_is_touched() -> None:
    model = tiny("gemma2")
    touched = {id(layer.self_attn) for layer in model.model.layers}
    before = {id(module): dict(vars(module)) for module in model.modules()}
    options = model.config.to_dict(), model.generation_config.to_dict()
    attach(model)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == options
    assert model.config._attn_implementation == "eager" and "generate" not in vars(model)
    for module in model.modules():
        changed = {name for name, value in vars(module).items() if before[id(module)][name] is not value}
        assert changed <= ({"config"} if id(module) in touched else set())
    detach(model)
    assert all(dict(vars(module)) == before[id(module)] for module in model.modules())


def _reloaded(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, _reloaded, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "torch.save", "pickle"],
)
def test_copies_are_attached_and_detach_by_themselves(
    again: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    model = attach(tiny("gemma2"))
    twin = again(model)
    assert is_attached(twin) and _expanded_layers(twin, "gemma2") == 0
    assert twin.model.layers[0].self_attn.config.config is twin.config
    detach(twin)
    assert not is_attached(twin) and is_attached(model)
    attach(twin)
    assert _expanded_layers(twin, "gemma2") == 0
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not torch.equal(model.lm_head.weight, twin.lm_head.weight)


def test_another_process_loads_an_attached_model(tmp_path: Any) -> None:
    """It has to import nothing of kvlathe's itself."""
    model, path = attach(tiny("gemma2")), tmp_path / "model.pt"
    torch.save(model, path)
    program = (
        f"import torch\nmodel = torch.load({str(path)!r}, weights_only=False)\n"
        f"print(float(model(torch.arange(9)[None]).logits.sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = float(model(torch.arange(9)[None]).logits.sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_what_is_saved_as_a_folder_knows_nothing_of_it(tmp_path: Any) -> None:
    attach(tiny("gemma2")).save_pretrained(tmp_path)
    assert "kvlathe" not in (tmp_path / "config.json").read_text()


def test_threads_share_an_attached_model() -> None:
    model = attach(tiny("gemma2"))

    def generate(seed: int) -> Tensor:
        cache = compressed_cache("gemma2")
        return model.generate(
            tokens(60 + seed, seed), past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0
        )

    alone = [generate(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_attention_weights_are_those_of_eager_attention() -> None:
    model = tiny("gemma2")
    caches = [compressed_cache("gemma2") for _ in range(2)]
    outputs = []
    for attached, cache in enumerate(caches):
        if attached:
            attach(model)
        _forward(model, cache, tokens(60))
        outputs.append(_forward(model, cache, tokens(3), output_attentions=True))
    assert all(weights is not None for weights in outputs[1].attentions) and len(outputs[1].attentions) == 2
    for expected, got in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        assert torch.equal(got, expected)


def test_gradients_flow_as_in_eager_attention() -> None:
    gradients = []
    for attached in (False, True):
        model, cache = tiny("gemma2"), compressed_cache("gemma2")
        if attached:
            attach(model)
        _forward(model, cache, tokens(60))
        model(input_ids=tokens(5), past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_another_attention_set_later_wins() -> None:
    """`set_attn_implementation` in mid-life: whatever it names gets its keys."""
    model = attach(tiny("llama", attn_implementation="eager"))
    assert _expanded_layers(model, "llama") == 0
    model.set_attn_implementation("sdpa")
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert _expanded_layers(model, "llama") == 0
    names = []

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    AttentionMaskInterface.register("noting", sdpa_mask)
    model.set_attn_implementation("noting")
    assert _expanded_layers(model, "llama") == 0 and names == ["LlamaAttention"] * 4


def test_a_users_own_attention_is_left_alone() -> None:
    def halved(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)

    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    model = tiny("llama", attn_implementation="halved")
    expected = _forward(model, None, tokens(50)).logits
    with pytest.warns(AttachWarning, match="halved"):
        attach(model)
    assert torch.equal(_forward(model, None, tokens(50)).logits, expected)
    # It is served from the blocks as well, as far as it goes through SDPA.
    assert _expanded_layers(model, "llama") == 0


def _squared(
    eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    out, weights = eager(module, query, key, value, mask, **kwargs)
    return out.square(), weights


def _sharper(
    eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    return eager(module, 1.05 * query, key, value, mask, **kwargs)


def _nearer(
    eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    """A window that no mask tells of."""
    hidden = torch.zeros(key.shape[2], dtype=query.dtype)
    hidden[:-40] = torch.finfo(query.dtype).min / 2
    return eager(module, query, key, value, hidden if mask is None else mask + hidden, **kwargs)


@pytest.mark.parametrize("other", [_squared, _sharper, _nearer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eager_function_of_another_kind_is_not_replaced(
    other: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried with random tokens before it is taken for softmax attention."""
    import transformers.models.llama.modeling_llama as modeling

    eager = modeling.eager_attention_forward
    model = attach(tiny("llama", attn_implementation="eager").to(dtype))
    caches = [
        CompressedDynamicCache.from_preset(preset_of("llama"), model=model, uncompressed_tail=0)
        for _ in range(2)
    ]
    with monkeypatch.context() as patched:
        patched.setattr(modeling, "eager_attention_forward", functools.partial(other, eager))
        for attached, cache in zip((True, False), caches, strict=True):
            (attach if attached else detach)(model)
            _forward(model, cache, tokens(60))
        with pytest.warns(ExpandedWarning):
            got = _forward(attach(model), caches[0], tokens(1)).logits
        expected = _forward(detach(model), caches[1], tokens(1)).logits
    assert torch.equal(got, expected)
