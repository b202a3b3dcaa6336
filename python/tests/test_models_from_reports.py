"""Models as users have them: with resized embeddings, offloaded, wrapped, in training mode, quantised, with a head for
something else, or with the positions of images."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import kvlathe
from kvlathe import (
    CalibrationOptions,
    CalibrationWarning,
    CompressedDynamicCache,
    Evaluator,
    Preset,
    calibrate,
)
from kvlathe._native import Preset as NativePreset
from kvlathe.calibration.fisher import output_projection_metric
from kvlathe.calibration.rope_probe import probe_rope
from kvlathe.calibration.text.sampled_text import sampled_windows
from kvlathe.errors import CalibrationError, ModelError, PresetError
from kvlathe.lab.evaluation.run import model_digest
from kvlathe.model_loading import load_model
from test_calibration import OPTIONS, random_windows
from test_sampled_text import Numbers
from tiny_models import VOCAB, tiny


def _bytes(model: nn.Module, gradients: bool = True) -> bytes:
    """A calibration as the bytes of its file: equal bytes are equal numbers."""
    options = CalibrationOptions(gradients=gradients, **OPTIONS)
    return bytes(calibrate(model, random_windows(4), options=options).native.to_safetensors())


def _preset(model: nn.Module, bits: float = 6.0) -> Preset:
    options = CalibrationOptions(cost_windows=0, **OPTIONS)
    preset = calibrate(model, random_windows(8), name="tiny", options=options)
    return preset.with_bits(bits + preset.side_bits_per_value).with_measured({"kld": 0.0})


# Resized embeddings.


def _as_older_files(preset: Preset) -> Preset:
    """The preset as it was written before there were cache fingerprints."""
    content = json.loads(preset.native.to_json())
    assert len(content["kvlathe"].pop("cache_fingerprint")) == 64
    return Preset(NativePreset.from_bytes(json.dumps(content).encode()))


@pytest.mark.parametrize("age", [lambda preset: preset, _as_older_files], ids=["new", "old"])
def test_resized_embeddings_keep_their_preset(age: Callable[[Preset], Preset]) -> None:
    model = tiny("llama")
    preset = age(_preset(model))
    ids = random_windows(1)[0][None]
    expected = _logits(model, preset, ids)
    for size in (VOCAB + 8, VOCAB - 28, 262_208):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == size
        preset.check_model(model.config)
    model = tiny("llama")
    model.resize_token_embeddings(VOCAB + 8)
    assert torch.equal(_logits(model, preset, ids)[..., :VOCAB], expected)
    # The other way, too: calibrated when it was larger.
    age(_preset(model)).check_model(tiny("llama").config)


@pytest.mark.parametrize("age", [lambda preset: preset, _as_older_files], ids=["new", "old"])
def test_other_models_are_refused_whatever_their_vocabulary(age: Callable[[Preset], Preset]) -> None:
    preset = age(_preset(tiny("llama")))
    rope = {"rope_type": "default", "rope_theta": 5e5}
    for other in (
        tiny("qwen2", vocab_size=VOCAB + 8),
        tiny("llama", vocab_size=VOCAB + 8, num_hidden_layers=3),
        tiny("llama", vocab_size=VOCAB + 8, rope_parameters=rope),
        tiny("llama", intermediate_size=112),
    ):
        with pytest.raises(PresetError, match="calibrated for `tiny`"):
            CompressedDynamicCache.from_preset(preset, model=other, uncompressed_tail=0)


def test_the_bundled_presets_take_their_model_with_more_tokens(bundled_preset: Preset) -> None:
    """SmolLM2-135M's config as published; SmolLM-135M has its shape, and another rotation."""
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "rope_theta": 100000,
    }
    for size in (49152, 49153, 49216):
        bundled_preset.check_model({**config, "vocab_size": size})
    with pytest.raises(PresetError, match="SmolLM2"):
        bundled_preset.check_model({**config, "vocab_size": 49152, "rope_theta": 10000})


@torch.no_grad()
def _logits(model: PreTrainedModel, preset: Preset, ids: Tensor) -> Tensor:
    cache = CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16)
    model(ids[:, :-1], past_key_values=cache)
    return model(ids[:, -1:], past_key_values=cache).logits


# Offloaded by accelerate.


def _offloaded(kind: str, name: str, folder: Path) -> PreTrainedModel:
    accelerate = pytest.importorskip("accelerate")
    model = tiny(name)
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if kind == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    last = "model.layers.1"
    parts = {part: "cpu" for part, module in model.named_modules() if not list(module.children())}
    device_map = {
        **{part: device for part, device in parts.items() if not part.startswith(last)},
        last: "disk",
    }
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "disk", "device_map"])
def test_offloaded_models_are_calibrated_as_whole_ones(kind: str, gradients: bool, tmp_path: Path) -> None:
    model = _offloaded(kind, "qwen2", tmp_path)
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert away
    assert _bytes(model, gradients) == _bytes(tiny("qwen2"), gradients)
    # As it was: offloaded, and trainable.
    assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == away
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_offloaded_models_are_judged_and_write_text(tmp_path: Path) -> None:
    model, whole = _offloaded("disk", "llama", tmp_path), tiny("llama")
    preset = _preset(whole)
    coders = kvlathe.lab.evaluation.coders(
        CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=0)
    )
    given, expected = (
        Evaluator(each, random_windows(2), tail=16, n_sinks=2).run(*coders) for each in (model, whole)
    )
    assert given == expected and given.kld > 0
    # What results are kept by is a digest of weights, which are not here.
    with pytest.raises(ModelError, match="offloaded"):
        model_digest(model)
    written, likewise = (sampled_windows(each, Numbers(), 40, 2) for each in (model, whole))
    assert all(torch.equal(a, b) for a, b in zip(written, likewise, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_output_projections_that_are_not_in_memory(name: str, tmp_path: Path) -> None:
    """With a bias (GPT-2) and without."""
    given = output_projection_metric(_offloaded("cpu", name, tmp_path), 1)
    torch.testing.assert_close(given, output_projection_metric(tiny(name), 1), rtol=1e-5, atol=1e-6)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("llama").config)
    for given in (load_model, _bytes):
        with pytest.raises(ModelError, match=r"meta device.*from_pretrained"):
            given(model)


# Heads for something else, and no head.

_HEADLESS = [
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
    "LlamaModel",
    "GPT2ForSequenceClassification",
    "GPT2Model",
]


def _with_head(name: str) -> Any:
    base = tiny("gpt2" if name.startswith("GPT2") else "llama")
    torch.manual_seed(0)
    model = getattr(transformers, name)(base.config).eval()
    decoder = model if name.endswith("Model") else model.base_model
    decoder.load_state_dict(base.base_model.state_dict())
    return model


@pytest.mark.parametrize("name", _HEADLESS)
def test_models_that_predict_no_tokens_are_refused(name: str) -> None:
    model = _with_head(name)
    sentence = rf"{name} does not predict tokens: .*AutoModelForCausalLM.*serves this model"
    for given in (
        load_model,
        _bytes,
        lambda model: Evaluator(model, random_windows(2)),
    ):
        with pytest.raises(ModelError, match=sentence):
            given(model)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"])
def test_masked_language_models_are_refused(name: str) -> None:
    config = getattr(transformers, name.replace("ForMaskedLM", "Config"))
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, name)(config(**sizes, intermediate_size=32, pad_token_id=0))
    with pytest.raises(ModelError, match=r"not causal|hands no keys and values"):
        _bytes(model)


def test_a_head_is_known_by_what_comes_out_of_it() -> None:
    """A language model that hides its head, and one whose head gives something else."""
    model = tiny("llama")
    model.get_output_embeddings = lambda: None
    assert load_model(model).model is model
    model.get_output_embeddings = lambda: nn.Linear(64, 1)
    assert load_model(model).model is model
    model.lm_head = nn.Linear(64, 1)
    with pytest.raises(ModelError, match=r"\(1, 2, 1\), expected .* \(1, 2, 128\)"):
        load_model(model)


def test_the_language_models_preset_serves_the_classifier() -> None:
    """What the refusal promises."""
    preset = _preset(tiny("llama"), bits=8.0)
    model = _with_head("LlamaForTokenClassification")
    ids = random_windows(1)[0][None]
    with torch.no_grad():
        given, expected = _logits(model, preset, ids), model(ids).logits
    spread = float(expected.std(dim=1).mean())
    assert 0 < float((given - expected[:, -1:]).abs().max()) < 0.05 * spread


def test_a_bare_decoder_without_gradients_needs_no_logits() -> None:
    options = CalibrationOptions(gradients=False, cost_windows=0, **OPTIONS)
    given, expected = (
        calibrate(model, random_windows(4), name="one", options=options).native.to_safetensors()
        for model in (_with_head("LlamaModel"), tiny("llama"))
    )
    assert given == expected


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path, model_folder: Path) -> None:
    """transformers would load it as a language model with a random head."""
    _with_head(name).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"does not have all weights .* lm_head\.weight") as caught:
        load_model(tmp_path)
    assert "cannot load" not in str(caught.value)
    assert load_model(model_folder).model.config.vocab_size > 0


# Wrappers and modes.


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrap", [_Wrapper, nn.DataParallel, torch.compile])
def test_wrappers_are_looked_into(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny("llama")
    wrapped = wrap(model)
    assert _bytes(wrapped) == _bytes(model)
    assert load_model(wrapped).model is model
    assert Evaluator(wrapped, random_windows(1), tail=16, n_sinks=2).run(None, None).kld < 1e-6


def test_what_is_no_transformers_model_is_refused() -> None:
    for given in (nn.Linear(2, 2), _Wrapper(nn.Linear(2, 2))):
        for take in (load_model, _bytes):
            with pytest.raises(ModelError, match=rf"got a {type(given).__name__}, expected a transformers"):
                take(given)


def test_peft_models_are_calibrated_with_their_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "o_proj"], lora_dropout=0.5, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    merged = copy.deepcopy(model).merge_and_unload().eval()
    for gradients in (True, False):
        options = CalibrationOptions(gradients=gradients, **OPTIONS)
        given, expected = (
            calibrate(each, random_windows(4), options=options).with_bits(4.0).native.expected_costs()
            for each in (model.train(), merged)
        )
        torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), rtol=1e-3, atol=0)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("gradients", [True, False])
def test_dropout_is_off_while_calibrating(gradients: bool) -> None:
    """GPT-2 here has 10 % of it; part of the model is frozen in evaluation mode, as adapters' bases are."""
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    assert _bytes(model, gradients) == _bytes(tiny("gpt2"), gradients)
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_while_judging_and_writing() -> None:
    training, model = tiny("gpt2").train(), tiny("gpt2")
    training.transformer.h[0].eval()
    before = [module.training for module in training.modules()]
    given, expected = (
        Evaluator(each, random_windows(1), tail=16).run(None, None) for each in (training, model)
    )
    assert given == expected
    written, likewise = (sampled_windows(each, Numbers(), 40, 2) for each in (training, model))
    assert all(torch.equal(a, b) for a, b in zip(written, likewise, strict=True))
    assert [module.training for module in training.modules()] == before


# Quantised and narrow models.


@pytest.fixture
def dynamic() -> Iterator[Callable[..., Any]]:
    """torch's dynamic int8, whose kernels have no derivative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda model, what: torch.ao.quantization.quantize_dynamic(model, what, dtype=torch.qint8)


def test_layers_without_gradients_are_told(dynamic: Callable[..., Any]) -> None:
    one = {"model.layers.0.self_attn.o_proj": torch.ao.quantization.default_dynamic_qconfig}
    for what, layers in (({nn.Linear}, r"\[0, 1\]"), (one, r"\[0\]")):
        with pytest.raises(
            CalibrationError, match=rf"layers {layers}.*gradients=False.*before it was quantised"
        ):
            _bytes(dynamic(tiny("llama"), what))


class _NoGradients(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


def test_logits_without_gradients_are_told() -> None:
    model = tiny("llama")
    model.lm_head = _NoGradients(model.lm_head)
    with pytest.raises(CalibrationError, match=r"logits carry no gradient.*gradients=False"):
        _bytes(model)


def test_quantised_models_are_calibrated_without_gradients(dynamic: Callable[..., Any]) -> None:
    """Their output projections are read from what they do, to int8's precision."""
    model = dynamic(tiny("llama"), {nn.Linear})
    given, expected = output_projection_metric(model, 1), output_projection_metric(tiny("llama"), 1)
    assert float((given - expected).norm() / expected.norm()) < 0.02
    _bytes(model, gradients=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype: torch.dtype) -> None:
    """Warned of where nobody takes notes; their presets serve the model in float32."""
    model = tiny("llama").to(dtype)
    options = CalibrationOptions(**OPTIONS)
    with pytest.warns(CalibrationWarning, match="float32"):
        preset = calibrate(model, random_windows(4), options=options)
    preset.check_model(tiny("llama").config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, random_windows(4), options=options, on_note=lambda _: None)


# Positions of images.

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}


def _sees_images(name: str, sections: list[int]) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    vision = dict(_VISION)
    if name == "Qwen2VL":
        vision.update(embed_dim=32, hidden_size=64)
    else:
        vision.update(out_hidden_size=64)
    if name == "Qwen3VL":
        vision.update(deepstack_visual_indexes=[0])
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Glm4v"])
def test_several_axes_are_noted(name: str) -> None:
    (note,) = [note for note in probe_rope(_sees_images(name, [2, 3, 3])).notes if "axes" in note]
    assert "images" in note and "calibration_guide" in note


def test_several_axes_are_found_by_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary module of nobody's, without sections: its second row of positions turns the second half of the pairs."""
    model = tiny("llama")
    rotary = model.model.rotary_emb

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = position_ids.expand(2, *position_ids.shape[-2:])
        angle = torch.stack([rows[0]] * 4 + [rows[1]] * 4, dim=-1) * rotary.inv_freq
        return angle.repeat(1, 1, 2).cos(), angle.repeat(1, 1, 2).sin()

    rotary.forward = forward
    assert any("axes" in note for note in probe_rope(model).notes)

    def broken(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if position_ids.dim() > 2:
            raise RuntimeError("one row of positions, please")
        return forward(x, position_ids)

    rotary.forward = broken
    assert probe_rope(model).notes == []


def test_several_axes_reach_who_calibrates() -> None:
    model = _sees_images("Qwen2_5_VL", [2, 3, 3])
    options = CalibrationOptions(cost_windows=0, **OPTIONS)
    with pytest.warns(CalibrationWarning, match="axes"):
        preset = calibrate(model, random_windows(4), options=options)
    assert any("axes" in note for note in preset.meta["kvlathe"]["calibration"]["notes"])
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        calibrate(model, random_windows(4), options=options, on_note=notes.append)
    assert any("axes" in note for note in notes)


@torch.no_grad()
def test_text_costs_nothing_and_images_somewhat() -> None:
    """What the note says, with key biases: at plain positions keys come back as those of a model with one axis do."""
    model = _sees_images("Qwen2_5_VL", [2, 3, 3])
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.bias.normal_(0, 2)
    options = CalibrationOptions(cost_windows=0, tail=16, n_sinks=2)
    with torch.enable_grad():
        preset = calibrate(model, random_windows(8), options=options, on_note=lambda _: None)
    preset = preset.with_bits(6 + preset.side_bits_per_value).with_measured({"kld": 0.0})
    embeddings = torch.randn(1, 1, 64) + 0.3 * torch.randn(1, 272, 64)
    patch = torch.arange(272)
    plain = patch.expand(3, 1, -1)
    image = torch.stack([0 * patch, patch // 16, patch % 16])[:, None]
    errors = []
    for positions in (plain, image):
        caches = (
            CompressedDynamicCache.from_preset(preset, model=model, uncompressed_tail=16),
            DynamicCache(config=model.config),
        )
        for cache in caches:
            model(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache)
        pairs = zip(*(cache.layers for cache in caches), strict=True)
        errors.append([float((ours.keys - own.keys).norm() / own.keys.norm()) for ours, own in pairs])
    assert max(errors[0]) < 0.05
    assert all(one < other < 10 * one for one, other in zip(*errors, strict=True)), errors
