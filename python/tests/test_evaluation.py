"""Sizes, runs that are resumed, tables, plots and reports of an evaluation."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cache_helpers import TAIL, model_of, preset_of, random_kv, tokens
from kvlathe import CompressedDynamicCache, Evaluator, KvlatheError, Preset
from kvlathe._native import Preset as NativePreset
from kvlathe.calibration.rope_probe import ModelShape, probe_rope
from kvlathe.errors import EvaluationError
from kvlathe.lab.baselines.kivi import Kivi
from kvlathe.lab.baselines.turboquant import TurboQuant
from kvlathe.lab.evaluation import (
    Method,
    PresetMethod,
    Result,
    Results,
    Setting,
    cache_size,
    coders,
    coders_of,
    evaluate,
    interval,
)
from kvlathe.lab.evaluation.plots import PLOTS, svg
from kvlathe.lab.evaluation.report import html_report
from kvlathe.lab.evaluation.run import make_setting, model_digest
from kvlathe.lab.evaluation.table import COLUMNS, markdown
from kvlathe.preset import Side

N_SINKS = 4


@functools.cache
def shape() -> ModelShape:
    return probe_rope(model_of("llama")).shape


def windows(n: int = 2, length: int = 96) -> list[Tensor]:
    return [tokens(length, seed=50 + at)[0] for at in range(n)]


def setting(mode: str = "streaming", **changes: Any) -> Setting:
    given = {"model_name": "tiny", "text_name": "noise", "n_sinks": N_SINKS, "tail": TAIL, **changes}
    return make_setting(model_of("llama"), windows(), mode=mode, **given)


# Sizes


def test_size_by_hand() -> None:
    """KIVI-4 at 1,024 tokens: 4 + 128 exact, 892 left, of which 27 groups of 32 are coded at 5 bits and 28 wait."""
    of = ModelShape(n_layers=3, n_heads=8, n_kv_heads=2, head_dim=64)
    size = cache_size(Kivi(of, 4), of, 1024, n_sinks=4, tail=128)
    assert size.n_coded == 864
    values_a_token = 2 * 3 * 2 * 64
    assert size.coded_bytes == 864 * values_a_token * 5 // 8
    assert size.exact_bytes == 160 * values_a_token * 2
    assert size.coded_bits == 5.0
    assert size.bits_per_value == pytest.approx((864 * 5 + 160 * 16) / 1024)
    assert size.key_bits == size.value_bits == (5.0, 5.0, 5.0)


def test_nothing_coded_is_sixteen_bits() -> None:
    of = ModelShape(1, 2, 2, 64)
    size = cache_size(Kivi(of, 2), of, 100, n_sinks=4, tail=128)
    assert (size.n_coded, size.bits_per_value, size.coded_bits) == (0, 16.0, 16.0)


@pytest.mark.parametrize("n_tokens", [96, 101, 300])
def test_our_size_is_the_real_caches(n_tokens: int) -> None:
    """What is stated for a preset is what a cache in 16 bits holds after so many tokens."""
    preset = preset_of("llama", 3.0)
    cache = CompressedDynamicCache.from_preset(preset, uncompressed_tail=TAIL)
    for layer in range(2):
        keys, values = random_kv(n_tokens, seed=layer, dtype=torch.bfloat16)
        cache.update(keys, values, layer)
    stats = cache.get_memory_stats()
    size = cache_size(PresetMethod(preset, shape()), shape(), n_tokens, n_sinks=N_SINKS, tail=TAIL)
    assert size.n_coded == stats["compressed_tokens"]
    assert size.coded_bytes == stats["coded_bytes"]
    # Room that the cache keeps for tokens to come is its own affair.
    assert size.exact_bytes <= stats["exact_bytes"]
    assert size.exact_bytes == 2 * 2 * 2 * 16 * 2 * stats["uncompressed_tokens"]


def test_a_calibration_without_a_rate_is_refused() -> None:
    preset = preset_of("llama")
    unset = type(preset)(preset.native)
    unset.meta = {**preset.meta, "kvlathe": {**preset.meta["kvlathe"], "bits_per_value": 0.0}}
    with pytest.raises(EvaluationError, match="--bits"):
        PresetMethod(unset, shape())


# Protocols


def test_a_preset_is_coded_as_its_cache_codes_it() -> None:
    preset = preset_of("llama", 3.0)
    keys, values = random_kv(90)
    ours = coders_of(PresetMethod(preset, shape()), N_SINKS)
    caches = coders(CompressedDynamicCache.from_preset(preset, uncompressed_tail=0))
    for mine, theirs, x in zip(ours, caches, (keys, values), strict=True):
        assert torch.equal(mine(1, x), theirs(1, x))
        assert not torch.equal(mine(1, x), x)


def test_an_incomplete_group_stays_exact() -> None:
    x, _ = random_kv(4 + 32 + 7)
    coded = coders_of(Kivi(shape(), 2), 4)[0](0, x)
    assert torch.equal(coded[:, :, :4], x[:, :, :4])
    assert torch.equal(coded[:, :, 36:], x[:, :, 36:])
    assert not torch.isclose(coded[:, :, 4:36], x[:, :, 4:36]).all()


class AllCoded(DynamicLayer):
    """A stock layer that hands attention what a method gives back of every token."""

    def __init__(self, method: Method, layer: int) -> None:
        super().__init__()
        self._method, self._layer = method, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        sides: tuple[Side, Side] = ("key", "value")
        return tuple(
            self._method.code(self._layer, side, x, 0) for side, x in zip(sides, (keys, values), strict=True)
        )


@torch.no_grad()
def test_all_coded_means_every_token() -> None:
    """Without sinks and tail the evaluator equals a stock model that reads coded keys and values alone."""
    model, method = model_of("llama"), TurboQuant(shape(), 3)
    klds = []
    for window in windows():
        cache = DynamicCache()
        cache.layers = [AllCoded(method, layer) for layer in range(2)]
        cache.layer_class_to_replicate = None
        p = model(window[None]).logits[0].double().log_softmax(-1)
        q = model(window[None], past_key_values=cache).logits[0].double().log_softmax(-1)
        klds.append((p.exp() * (p - q)).sum(-1))
    evaluator = Evaluator(model, windows(), tail=0, n_sinks=0, max_kept_bytes=0)
    quality = evaluator.run(*coders_of(method, 0))
    kld = torch.stack(klds)
    assert quality.kld == pytest.approx(float(kld.mean()), rel=1e-4)
    assert quality.kld_max == pytest.approx(float(kld.max()), rel=1e-3)
    assert quality.kld_by_position[0] == pytest.approx(float(kld[:, :3].mean()), rel=1e-3)
    # And it costs more than when sinks and tail are exact.
    streaming = Evaluator(model, windows(), tail=TAIL, n_sinks=N_SINKS).run(*coders_of(method, N_SINKS))
    assert streaming.kld < quality.kld


def test_all_coded_ignores_sinks_and_tail() -> None:
    assert (setting("all-coded").n_sinks, setting("all-coded").tail) == (0, 0)
    with pytest.raises(EvaluationError, match="nothing to be coded"):
        setting(tail=92)
    with pytest.raises(EvaluationError, match='"streaming" or "all-coded"'):
        setting("both")


# Intervals


def test_bootstrap_intervals() -> None:
    """For many samples the interval of a mean is its normal one, ± 1.96 standard errors."""
    samples = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    low, high = interval(samples.tolist())
    reach = 1.96 * float(samples.std()) / math.sqrt(400)
    assert low == pytest.approx(float(samples.mean()) - reach, abs=0.1 * reach)
    assert high == pytest.approx(float(samples.mean()) + reach, abs=0.1 * reach)
    assert interval([2.5] * 7) == (2.5, 2.5)


# Runs


class Counted(TurboQuant):
    """Counts what it is asked to code."""

    def __init__(self, bits: int) -> None:
        super().__init__(shape(), bits)
        self.n_calls = 0

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        self.n_calls += 1
        return super().code(layer, side, x, position)


def run(path: Path, methods: list[Any], of: Setting | None = None) -> list[Result]:
    return list(evaluate(model_of("llama"), windows(), methods, of or setting(), shape(), Results(path)))


def test_a_rerun_measures_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    three, four, again = Counted(3), Counted(4), Counted(3)
    (first,) = run(path, [three])
    assert three.n_calls == 2 * 2 * 2  # windows, layers, sides
    kept, new = run(path, [again, four])
    assert again.n_calls == 0 and four.n_calls == 8
    assert kept == first
    assert new.quality.kld < first.quality.kld
    assert len(path.read_text().splitlines()) == 2


def test_results_are_written_as_they_come(tmp_path: Path) -> None:
    """An interruption in the second method leaves the first one's result, and half a line does no harm."""
    path = tmp_path / "results.jsonl"

    class Interrupted(Counted):
        def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, [Counted(3), Interrupted(4)])
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    three, four = Counted(3), Counted(4)
    assert [result.name for result in run(path, [three, four])] == ["turboquant-3", "turboquant-4"]
    assert three.n_calls == 0 and four.n_calls > 0
    assert len(Results(path)) == 2


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(path, [Counted(3)])
    path.write_text(path.read_text().rstrip("\n"))
    again, four = Counted(3), Counted(4)
    run(path, [again, four])
    assert again.n_calls == 0
    assert len(Results(path)) == len(path.read_text().splitlines()) == 2


def test_another_setting_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(path, [Counted(3)])
    changed = Counted(3)
    (result,) = run(path, [changed], setting("all-coded"))
    assert changed.n_calls > 0 and result.setting.mode == "all-coded"


def test_keys_tell_apart_what_matters() -> None:
    method, base = Counted(3), setting()
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"text_digest": "x"},
            {"model_digest": "x"},
            {"window": 97},
            {"n_windows": 3},
            {"tail": 8},
            {"n_sinks": 0},
            {"mode": "all-coded"},
            {"dtype": "bfloat16"},
            {"library_version": "x"},
        )
    ]
    keys = {of.key(method) for of in [base, *others]} | {base.key(Counted(4))}
    assert len(keys) == len(others) + 2
    # The same model in another folder is the same model.
    assert dataclasses.replace(base, model="elsewhere").key(method) == base.key(method)


def test_models_of_one_config_differ() -> None:
    other = make_setting(
        model_of("llama", seed=1),
        windows(),
        mode="streaming",
        model_name="tiny",
        text_name="noise",
        n_sinks=N_SINKS,
        tail=TAIL,
    )
    assert other.model_digest != setting().model_digest
    assert other.text_digest == setting().text_digest


def test_another_attention_or_another_transformers_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    digests = [model_digest(model)]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    digests.append(model_digest(model))
    model.set_attn_implementation(before)
    assert model_digest(model) == digests[0]
    monkeypatch.setattr("kvlathe.lab.evaluation.run.transformers.__version__", "0.0")
    digests.append(model_digest(model))
    assert len(set(digests)) == 3


def test_a_seeds_preset_of_another_model_is_refused() -> None:
    content = {"model": "m", "rank": 4, "head_dim": 16, "n_layers": 1, "n_heads": 4, "layers": []}
    side = {"U": torch.eye(16)[:, :4].tolist(), "mean": [0.0] * 16}
    content["layers"] = [{"K": side, "V": side}]
    preset = Preset(NativePreset.from_bytes(json.dumps(content).encode()))
    with pytest.raises(EvaluationError, match=r"1 layers and head_dim 16.*2 layers"):
        PresetMethod(preset, shape())


def test_two_methods_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="turboquant-3"):
        run(tmp_path / "results.jsonl", [Counted(3), Counted(3)])


@pytest.mark.parametrize(
    "content", ['{"key": "x"}\n', "not json\n", "[]\n", "\xff\xfe\n", '{"model": "a preset in one line"}']
)
def test_a_file_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(KvlatheError, match="results"):
        Results(path)
    assert path.read_bytes() == content.encode("latin-1")


# Tables, plots, reports


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    presets = [PresetMethod(preset_of("llama", bits), shape()) for bits in (2.0, 4.0)]
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    return run(path, [*presets, Counted(3), Kivi(shape(), 4)])


def test_the_table_has_a_line_each(results: list[Result]) -> None:
    lines = markdown(results).splitlines()
    assert len(lines) == 2 + len(results)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    for line, result in zip(lines[2:], results, strict=True):
        assert line.startswith(f"| {result.name} | {result.size.bits_per_value:.2f} |")
        assert f"{100 * result.quality.top1:.2f} %" in line


def test_plots_show_every_method(results: list[Result]) -> None:
    against_bits, by_position = (svg(PLOTS[name](results)) for name in list(PLOTS)[:2])
    assert all(result.family in against_bits for result in results)
    assert all(result.name in by_position for result in results)
    assert all(text.startswith("<svg") for text in (against_bits, by_position))


def test_the_heat_map_is_the_allocation(results: list[Result]) -> None:
    """Its rows are K and V of each of our rates, and their means are the rate itself."""
    (axes, _colours) = PLOTS["bits-by-layer"](results).axes
    rows = axes.images[0].get_array()
    ours = results[:2]
    assert rows.shape == (4, 2)
    for at, result in enumerate(ours):
        assert float(rows[2 * at : 2 * at + 2].mean()) == pytest.approx(result.size.coded_bits)
        assert rows[2 * at : 2 * at + 2].tolist() == [
            list(result.size.key_bits),
            list(result.size.value_bits),
        ]
    # Without any of ours it shows the others.
    (axes, _colours) = PLOTS["bits-by-layer"](results[2:]).axes
    assert axes.images[0].get_array().shape == (4, 2)


def test_the_report_needs_nothing_else(results: list[Result]) -> None:
    renamed = [
        dataclasses.replace(result, setting=dataclasses.replace(result.setting, model="<b>tiny</b>"))
        for result in results
    ]
    page = html_report(renamed, ["hf-hqq-4 does not run here: install `HQQ` <now>"])
    assert page.count("<svg") == len(PLOTS)
    assert "&lt;b&gt;tiny" in page and "<b>tiny" not in page
    assert "&lt;now&gt;" in page
    for result in results:
        assert f"<td>{result.name}</td>" in page
    assert "<script" not in page and "<link" not in page and "<!DOCTYPE svg" not in page
    # References stay inside the page, or are the picture themselves.
    references = re.findall(r'(?:src|href)="([^"]*)', page)
    assert references and all(reference.startswith(("#", "data:image/png")) for reference in references)


def test_plots_without_matplotlib(results: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(EvaluationError, match=r"pip install 'kvlathe\[plots\]'"):
        html_report(results)
