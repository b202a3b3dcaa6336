"""Running an evaluation: every method on the same windows, results kept as they come, and found again on a re-run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..._native import version
from ...calibration.quality.evaluator import Evaluator, Quality
from ...calibration.rope_probe import ModelShape
from ...errors import EvaluationError, ModelError
from .method import Method, coders_of
from .results_file import ResultsFile, dataclass_from
from .size import CacheSize, cache_size

# Of a config, what tells where a model came from, not what it computes.
_NAMES = frozenset({"_name_or_path", "name_or_path", "transformers_version"})

# Lengths at which every result states its bits a value, besides that of its windows.
LENGTHS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share. Two equal settings give comparable results.

    Attributes:
        model, text: names for people.
        model_digest, text_digest: of config and weights, and of the windows' tokens.
        dtype: what the model computes in.
        window: tokens of a window.
        n_windows: how many.
        mode: "streaming" or "all-coded".
        n_sinks, tail: first and latest tokens that a query reads exactly; both 0 for "all-coded".
        library_version: kvlathe's; another version measures anew.
    """

    model: str
    model_digest: str
    text: str
    text_digest: str
    dtype: str
    window: int
    n_windows: int
    mode: str
    n_sinks: int
    tail: int
    library_version: str

    def key(self, method: Method) -> str:
        """Digest of all that a method's numbers depend on."""
        # Names do not count: the same model in another folder is the same model.
        settled = {name: value for name, value in asdict(self).items() if name not in ("model", "text")}
        text = json.dumps([settled, method.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_setting(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    *,
    model_name: str,
    text_name: str,
    mode: str,
    n_sinks: int,
    tail: int,
) -> Setting:
    """The setting of an evaluation of ``model`` on ``windows`` (LongTensors of one length).

    Raises:
        EvaluationError: an unknown mode, or windows in which no token would be coded.
    """
    if mode not in ("streaming", "all-coded"):
        raise EvaluationError(f'the mode is {mode!r}, expected "streaming" or "all-coded"')
    if mode == "all-coded":
        n_sinks = tail = 0
    window = min(len(ids) for ids in windows)
    if window <= n_sinks + tail:
        raise EvaluationError(
            f"in windows of {window} tokens, {n_sinks} sinks and a tail of {tail} tokens leave nothing to be coded; "
            f"use longer windows, a shorter tail or the mode all-coded"
        )
    return Setting(
        model=model_name,
        model_digest=model_digest(model),
        text=text_name,
        text_digest=windows_digest(windows),
        dtype=str(model.dtype).removeprefix("torch."),
        window=window,
        n_windows=len(windows),
        mode=mode,
        n_sinks=n_sinks,
        tail=tail,
        library_version=version(),
    )


def windows_digest(windows: Iterable[Tensor]) -> str:
    """Digest of windows of tokens."""
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(len(ids).to_bytes(8, "little") + ids.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_digest(model: PreTrainedModel) -> str:
    """The config, a few numbers of every parameter and buffer, and what computes with them: enough to tell fine-tuned
    models, and the same model under another version of transformers, apart.

    Raises:
        ModelError: weights that are not in memory.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} is offloaded, and results are kept with a digest of the weights; load it whole"
        )
    config = model.config.to_dict()
    told_apart = [
        # Names do not count: the same model in another folder is the same model.
        json.dumps({k: v for k, v in config.items() if k not in _NAMES}, sort_keys=True, default=str),
        str(model.config._attn_implementation),
        model.device.type,
        transformers.__version__,
    ]
    digest = hashlib.sha256("\0".join(told_apart).encode())
    # Some rotations change with the length of what was read last.
    buffers = [of for of in model.named_buffers() if not of[0].endswith("inv_freq")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32)
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """One method's figures.

    Attributes:
        key: `Setting.key` of the method.
        name, family: the method's.
        size: of the cache at the window's length.
        bits_at: bits a value of the whole cache at other lengths, by number of tokens.
        quality: against the exact cache.
        seconds: that measuring took.
    """

    key: str
    setting: Setting
    name: str
    family: str
    size: CacheSize
    bits_at: dict[int, float]
    quality: Quality
    seconds: float

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**asdict(self), "torch_version": torch.__version__})

    @classmethod
    def from_json(cls, line: str) -> Result:
        """What `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it did not.
        """
        content = json.loads(line)
        return cls(
            key=content["key"],
            setting=Setting(**content["setting"]),
            name=content["name"],
            family=content["family"],
            size=dataclass_from(CacheSize, content["size"]),
            bits_at={int(n): bits for n, bits in content["bits_at"].items()},
            quality=dataclass_from(Quality, content["quality"]),
            seconds=content["seconds"],
        )


class Results(ResultsFile[Result]):
    """The file of ``kvlathe eval``'s results, one line a method; see `ResultsFile`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Result.from_json, "kvlathe eval")


def evaluate(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    methods: Sequence[Method],
    setting: Setting,
    shape: ModelShape,
    results: Results,
    *,
    on_kept: Callable[[Result], None] | None = None,
) -> Iterator[Result]:
    """Measure methods one after another and yield each result, in the order given.

    A method that ``results`` already holds for this setting is not measured again. The exact cache runs once for all.

    Args:
        on_kept: takes each result that was found instead of measured, before it is yielded.

    Raises:
        EvaluationError: two methods of one name, or results that cannot be written.
    """
    names = [method.name for method in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"more than one method is called {', '.join(twice)}; give each once")
    evaluator = Evaluator(model, windows, tail=setting.tail, n_sinks=setting.n_sinks)
    waiting = sum(results.get(setting.key(method)) is None for method in methods)
    times: list[float] = []
    for method in methods:
        key = setting.key(method)
        kept = results.get(key)
        if kept is not None:
            kept = dataclasses.replace(kept, name=method.name, family=method.family, setting=setting)
            (on_kept or (lambda _: None))(kept)
            yield kept
            continue
        start = time.perf_counter()
        what = f"{method.name} ({len(times) + 1} of {waiting}{_left(times, waiting)})"
        quality = evaluator.run(*coders_of(method, setting.n_sinks), what=what)
        times.append(time.perf_counter() - start)
        result = _result(method, setting, shape, quality, times[-1])
        results.append(result)
        yield result


def _left(times: Sequence[float], waiting: int) -> str:
    """How long the methods that wait will take, judged by those that are done."""
    if not times:
        return ""
    # The first run includes the exact cache's, so later ones say more.
    typical = sorted(times)[len(times) // 2]
    minutes = typical * (waiting - len(times)) / 60
    return f", {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def _result(method: Method, setting: Setting, shape: ModelShape, quality: Quality, seconds: float) -> Result:
    def size(n_tokens: int) -> CacheSize:
        return cache_size(method, shape, n_tokens, n_sinks=setting.n_sinks, tail=setting.tail)

    return Result(
        key=setting.key(method),
        setting=setting,
        name=method.name,
        family=method.family,
        size=size(setting.window),
        bits_at={n_tokens: size(n_tokens).bits_per_value for n_tokens in LENGTHS},
        quality=quality,
        seconds=seconds,
    )
