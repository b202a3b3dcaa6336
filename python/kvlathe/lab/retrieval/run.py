"""Running trials: every cache on the same prompts, results kept as they come, and found again on a re-run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..._native import version
from ...attachment import attach, can_attach, detach
from ...errors import EvaluationError
from ...given_model import evaluation_mode, input_device
from ...progress import weighted_progress
from ..evaluation.results_file import ResultsFile, dataclass_from
from ..evaluation.run import model_digest
from .caches import PREFILL_CHUNK_TOKENS, Context, Holder, answer_log_probs
from .prompt import Prompt


@dataclass(frozen=True)
class Setting:
    """What all trials of a comparison share.

    Attributes:
        model, text: names for people.
        model_digest: of config and weights.
        dtype: what the model computes in.
        chunk: tokens that the model reads at once.
        n_sinks, tail: first and latest tokens that stay exact; ours take the sinks of their preset instead.
        library_version: kvlathe's; another version measures anew.
    """

    model: str
    model_digest: str
    text: str
    dtype: str
    chunk: int
    n_sinks: int
    tail: int
    library_version: str

    def key(self, holder: Holder, prompt: Prompt) -> str:
        """Digest of all that a trial's numbers depend on."""
        # Names do not count: the tokens are in the prompt's digest. Each cache knows its own exact tokens.
        apart = ("model", "text", "n_sinks", "tail")
        settled = {name: value for name, value in asdict(self).items() if name not in apart}
        text = json.dumps([settled, holder.identity, prompt.digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_setting(
    model: PreTrainedModel, *, model_name: str, text_name: str, n_sinks: int, tail: int
) -> Setting:
    """The setting of trials of ``model`` with these exact tokens."""
    return Setting(
        model=model_name,
        model_digest=model_digest(model),
        text=text_name,
        dtype=str(model.dtype).removeprefix("torch."),
        chunk=PREFILL_CHUNK_TOKENS,
        n_sinks=n_sinks,
        tail=tail,
        library_version=version(),
    )


@dataclass(frozen=True)
class Trial:
    """One cache asked for one needle.

    Attributes:
        key: `Setting.key` of cache and prompt.
        name, family: the cache's.
        kind, number, length, depth, needle_at: the prompt's.
        answer: what was to be found.
        log_probs: natural logarithm of the probability of each token of the answer, those before it given.
        found: greedy decoding gives the answer.
        bits_per_value, coded_bits: of the whole cache at that length, and of its coded part.
        seconds: that it took; what several caches share is with the one that came first.
    """

    key: str
    setting: Setting
    name: str
    family: str
    kind: str
    number: int
    length: int
    depth: float
    needle_at: int
    answer: str
    log_probs: tuple[float, ...]
    found: bool
    bits_per_value: float
    coded_bits: float
    seconds: float

    @property
    def prompt(self) -> tuple[str, int, int, float]:
        """What tells prompts of one comparison apart."""
        return self.kind, self.number, self.length, self.depth

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole answer, in nats."""
        return sum(self.log_probs)

    @property
    def log_prob_per_token(self) -> float:
        """Mean log-probability of the answer's tokens, in nats."""
        return self.log_prob / len(self.log_probs)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**asdict(self), "torch_version": torch.__version__})

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """What `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: it did not.
        """
        content = json.loads(line)
        del content["torch_version"]
        trial: Trial = dataclass_from(cls, {**content, "setting": Setting(**content["setting"])})
        return trial


class Trials(ResultsFile[Trial]):
    """The file of ``kvlathe needle``'s results, one line a trial; see `ResultsFile`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Trial.from_json, "kvlathe needle")


def check_lengths(prompts: Sequence[Prompt], setting: Setting) -> None:
    """Refuse prompts so short that no token would be coded.

    Raises:
        EvaluationError: with what to do.
    """
    shortest = min(prompt.length for prompt in prompts)
    if shortest <= setting.n_sinks + setting.tail:
        raise EvaluationError(
            f"in {shortest} tokens, {setting.n_sinks} sinks and a tail of {setting.tail} tokens leave nothing to be "
            f"coded; use longer lengths or a shorter tail"
        )


@contextmanager
def _attached(model: PreTrainedModel) -> Iterator[None]:
    """The model as users have it while ours hold its text; as it was before afterwards."""
    if not can_attach(model):
        yield
        return
    attach(model)
    try:
        yield
    finally:
        detach(model)


def search(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    holders: Sequence[Holder],
    setting: Setting,
    trials: Trials,
    *,
    on_kept: Callable[[Trial], None] | None = None,
) -> Iterator[Trial]:
    """Ask every cache for every needle and yield each trial, prompt after prompt.

    A trial that ``trials`` already holds for this setting is not run again. The model is attached meanwhile, where
    `attach` has something to do.

    Args:
        on_kept: takes each trial that was found instead of run, before it is yielded.

    Raises:
        EvaluationError: two caches of one name, or trials that cannot be written.
    """
    names = [holder.name for holder in holders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"more than one cache is called {', '.join(twice)}; give each once")
    keys = [(prompt, holder, setting.key(holder, prompt)) for prompt in prompts for holder in holders]
    weights = [
        0.0 if trials.get(key) is not None else prompt.length * holder.effort for prompt, holder, key in keys
    ]
    context: Context | None = None
    asked: Prompt | None = None
    with evaluation_mode(model), _attached(model):
        for prompt, holder, key in weighted_progress(keys, weights, "searching", "token"):
            kept = trials.get(key)
            if kept is not None:
                kept = dataclasses.replace(kept, name=holder.name, family=holder.family, setting=setting)
                (on_kept or (lambda _: None))(kept)
                yield kept
                continue
            if context is None or asked is not prompt:
                ids = torch.tensor(prompt.text, device=input_device(model))
                asked, context = prompt, Context(model, ids)
            trial = _ask(context, prompt, holder, setting, key)
            trials.append(trial)
            yield trial


@torch.no_grad()
def _ask(context: Context, prompt: Prompt, holder: Holder, setting: Setting, key: str) -> Trial:
    start = time.perf_counter()
    device = context.ids.device
    cache = holder.hold(context, len(prompt.question))
    log_probs, found = answer_log_probs(
        context.model,
        cache,
        torch.tensor(prompt.question, device=device),
        torch.tensor(prompt.answer, device=device),
    )
    bits, coded_bits = holder.bits(prompt.length)
    return Trial(
        key=key,
        setting=setting,
        name=holder.name,
        family=holder.family,
        kind=prompt.kind,
        number=prompt.number,
        length=prompt.length,
        depth=prompt.depth,
        needle_at=prompt.needle_at,
        answer=prompt.answer_text,
        log_probs=tuple(log_probs),
        found=found,
        bits_per_value=bits,
        coded_bits=coded_bits,
        seconds=time.perf_counter() - start,
    )
