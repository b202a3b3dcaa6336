"""Needles, haystacks, prompts, and how caches are asked for what they hold."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from cache_helpers import TAIL, model_of, preset_of, tokens
from kvlathe import CorpusError, attach, corpus_from_files
from kvlathe.attachment import is_attached
from kvlathe.calibration.rope_probe import ModelShape, probe_rope
from kvlathe.errors import EvaluationError
from kvlathe.lab.baselines.baseline import Baseline
from kvlathe.lab.baselines.kivi import Kivi
from kvlathe.lab.baselines.llama_cpp import LlamaCpp
from kvlathe.lab.evaluation.plots import svg
from kvlathe.lab.retrieval import (
    KINDS,
    CodedHolder,
    ExactHolder,
    Haystack,
    Holder,
    PresetHolder,
    Prompt,
    Setting,
    Trial,
    Trials,
    make_prompts,
    search,
)
from kvlathe.lab.retrieval.needle import kinds_named
from kvlathe.lab.retrieval.plots import PLOTS
from kvlathe.lab.retrieval.report import html_report
from kvlathe.lab.retrieval.run import make_setting
from kvlathe.lab.retrieval.table import markdown, rows_by_kind, rows_by_length
from kvlathe.preset import Side
from tiny_models import tiny

N_SINKS = 4
CHAT = "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}\n{% endfor %}<reply>\n"


def shape() -> ModelShape:
    return probe_rope(model_of("llama")).shape


# Needles


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_needle_answers_its_question(kind: Any) -> None:
    needle = kind.draw(Random("a"))
    assert needle == kind.draw(Random("a"))
    assert needle.statement.startswith(needle.opening + needle.answer)
    assert needle.answer.startswith(" ")
    # The question names what the statement is about, but not the answer.
    assert needle.answer.strip() not in needle.question
    subject = needle.opening.split()[-2]
    assert subject in needle.question
    assert len({kind.draw(Random(seed)).answer for seed in range(50)}) > 40


def test_unknown_kinds_are_named() -> None:
    assert [kind.name for kind in kinds_named(["fact", "number", "fact"])] == ["fact", "number"]
    with pytest.raises(EvaluationError, match=r"rhyme.*number, fact, sentence"):
        kinds_named(["number", "rhyme"])


# Haystacks


def test_runs_end_with_a_sentence() -> None:
    sentences = [[at] * (at + 1) for at in range(10)]  # 55 tokens
    haystack = Haystack(sentences)
    for seed in range(30):
        run = haystack.run(40, Random(seed))
        assert len(run.ids) == 40
        assert run.boundaries[0] == 0 and run.boundaries[-1] == 40
        last = run.ids[-1]
        assert run.ids[-last - 1 :] == [last] * (last + 1)
        for boundary in run.boundaries[1:-1]:
            # The next sentence of the ring begins here.
            assert run.ids[boundary] == (run.ids[boundary - 1] + 1) % 10
    assert len({tuple(haystack.run(40, Random(seed)).ids) for seed in range(30)}) > 5
    with pytest.raises(CorpusError, match="56 tokens of a text that has 55"):
        haystack.run(56, Random(0))


def test_a_run_is_split_at_the_nearest_boundary() -> None:
    haystack = Haystack([[at] * 10 for at in range(6)])
    run = haystack.run(60, Random(0))
    for depth, before in ((0.0, 0), (0.08, 0), (0.09, 10), (0.5, 30), (0.57, 30), (0.6, 40), (1.0, 60)):
        left, right = run.split(depth)
        assert (len(left), len(right)) == (before, 60 - before)
        assert left + right == run.ids


# Prompts


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    """One token a byte."""
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def haystack(tokenizer: Any, text_file: Path) -> Haystack:
    return Haystack.from_documents(tokenizer, corpus_from_files(text_file).held_out, 1500)


def prompts_of(tokenizer: Any, haystack: Haystack, **changes: Any) -> list[Prompt]:
    given: dict[str, Any] = {
        "kinds": list(KINDS.values()),
        "lengths": (900, 1500),
        "depths": (0.0, 0.3, 0.5, 1.0),
        "n_needles": 2,
        **changes,
    }
    return make_prompts(tokenizer, haystack, **given)


def test_prompts_have_their_length_and_the_needle_its_depth(tokenizer: Any, haystack: Haystack) -> None:
    prompts = prompts_of(tokenizer, haystack)
    assert len(prompts) == 3 * 2 * 4 * 2
    for prompt in prompts:
        assert len(prompt.text) + len(prompt.question) + len(prompt.answer) == prompt.length
        text = tokenizer.decode(prompt.text)
        question, answer = tokenizer.decode(prompt.question), tokenizer.decode(prompt.answer)
        assert answer == f" {prompt.answer_text}"
        (at,) = [match.start() for match in re.finditer(re.escape(answer), text)]
        opening = question.strip()
        # Without a chat template the text is continued, in the words of the needle.
        assert text[:at].endswith(f"\n{opening}")
        assert at - len(opening) - 1 == prompt.needle_at
        before, after = text[: prompt.needle_at], text[at + len(answer) :].partition("\n")[2]
        wanted = prompt.depth * (len(before) + len(after))
        longest = 50  # characters of a sentence of the test's text
        assert abs(len(before) - wanted) <= longest
        assert before == "" or before.endswith((".", "\n"))
        if prompt.depth == 1.0:
            assert after == ""
    assert {prompt.needle_at for prompt in prompts if prompt.depth == 0.0} == {0}


def test_cells_do_not_depend_on_each_other(tokenizer: Any, haystack: Haystack) -> None:
    all_cells = prompts_of(tokenizer, haystack)
    some = prompts_of(tokenizer, haystack, lengths=(1500,), depths=(0.3,), kinds=[KINDS["fact"]])
    assert len(some) == 2 and all(prompt in all_cells for prompt in some)
    assert len({prompt.digest for prompt in all_cells}) == len(all_cells)
    other = prompts_of(tokenizer, haystack, seed=1)
    assert not {prompt.digest for prompt in other} & {prompt.digest for prompt in all_cells}
    assert [prompt.length for prompt in all_cells] == sorted(prompt.length for prompt in all_cells)


def test_the_chat_template_is_used(tokenizer: Any, haystack: Haystack) -> None:
    chatty = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT)
    (prompt,) = prompts_of(
        chatty, haystack, lengths=(900,), depths=(0.5,), kinds=[KINDS["number"]], n_needles=1
    )
    assert len(prompt.text) + len(prompt.question) + len(prompt.answer) == 900
    assert chatty.decode(prompt.text).startswith("<user>\nRead the text.")
    end = chatty.decode(prompt.question)
    assert re.fullmatch(
        r"\n\nWhat is the special magic number of (\w+)\?\n<reply>The special magic number of \1 is", end
    )


def test_a_template_that_hides_the_message_is_refused(tokenizer: Any, haystack: Haystack) -> None:
    silent = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template="<reply>")
    with pytest.raises(EvaluationError, match="chat template"):
        prompts_of(silent, haystack)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"lengths": (60,)}, EvaluationError, "no room for text"),
        ({"lengths": (200_000,)}, CorpusError, "of a text that has"),
        ({"depths": (0.5, 1.5)}, EvaluationError, "from 0 to 1, got 1.5"),
    ],
)
def test_impossible_prompts(
    changes: dict[str, Any], error: type[Exception], says: str, tokenizer: Any, haystack: Haystack
) -> None:
    with pytest.raises(error, match=says):
        prompts_of(tokenizer, haystack, **changes)


def test_too_little_text(tokenizer: Any, text_file: Path) -> None:
    with pytest.raises(CorpusError, match="haystacks need 1000000"):
        Haystack.from_documents(tokenizer, corpus_from_files(text_file).held_out, 1_000_000)


# Caches


def prompt_of(n_text: int = 160, answer: tuple[int, ...] | None = None, seed: int = 0) -> Prompt:
    """Random tokens; the answer is what the model says with the exact cache."""
    text, question = (tuple(tokens(n, seed=seed + at)[0].tolist()) for at, n in enumerate((n_text, 6)))
    if answer is None:
        ids = torch.tensor([text + question])
        said = model_of("llama").generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        answer = tuple(said[0, ids.shape[1] :].tolist())
    length = len(text) + len(question) + len(answer)
    return Prompt("noise", 0, length, 0.5, n_text // 2, text, question, answer, "noise")


def setting() -> Setting:
    return make_setting(model_of("llama"), model_name="tiny", text_name="noise", n_sinks=N_SINKS, tail=TAIL)


def coded(method: Baseline) -> CodedHolder:
    return CodedHolder(method, shape(), N_SINKS, TAIL)


def run(path: Path, prompts: list[Prompt], *holders: Holder) -> list[Trial]:
    return list(search(model_of("llama"), prompts, holders, setting(), Trials(path)))


class Spoiled(Baseline):
    """Gives back zeros, or what ``change`` makes of the numbers, and notes what it was asked for."""

    name = family = "spoiled"

    def __init__(self, change: Any = torch.zeros_like) -> None:
        super().__init__(shape())
        self.change = change
        self.asked: list[tuple[int, Side, int, int]] = []

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        self.asked.append((layer, side, x.shape[2], position))
        return self.change(x)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        return 0


@torch.no_grad()
def test_the_exact_cache_is_a_plain_forward(tmp_path: Path) -> None:
    prompts = [prompt_of(), prompt_of(700, answer=(7, 90, 33))]  # in one chunk, and in two
    trials = run(tmp_path / "trials.jsonl", prompts, ExactHolder())
    for prompt, trial in zip(prompts, trials, strict=True):
        ids = torch.tensor([prompt.text + prompt.question + prompt.answer])
        n = len(prompt.answer)
        log_probs = model_of("llama")(ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
        wanted = [float(row[token]) for row, token in zip(log_probs, prompt.answer, strict=True)]
        assert trial.log_probs == pytest.approx(wanted, abs=1e-4)
        assert trial.log_prob == pytest.approx(sum(wanted), abs=1e-3)
        assert trial.found == (log_probs.argmax(-1).tolist() == list(prompt.answer))
    # The first answer is the model's own, the second is not.
    assert [trial.found for trial in trials] == [True, False]


def test_many_bits_are_as_good_as_exact_and_none_are_worse(tmp_path: Path) -> None:
    prompt = prompt_of(600)
    exact, ours, q8, same, zeros = run(
        tmp_path / "trials.jsonl",
        [prompt],
        ExactHolder(),
        PresetHolder(preset_of("llama", 8.0), shape(), TAIL),
        coded(LlamaCpp(shape(), 8)),
        coded(named(Spoiled(lambda x: x), "same")),
        coded(Spoiled()),
    )
    assert same.log_probs == pytest.approx(exact.log_probs, abs=1e-5)
    assert ours.log_probs == pytest.approx(exact.log_probs, abs=0.05)
    assert q8.log_probs == pytest.approx(exact.log_probs, abs=0.05)
    assert exact.found and ours.found and q8.found
    assert zeros.log_prob < exact.log_prob - 1
    assert (exact.bits_per_value, exact.coded_bits) == (16.0, 16.0)
    assert 8 < ours.coded_bits < ours.bits_per_value < 16


def named(method: Spoiled, name: str) -> Spoiled:
    method.name = name  # type: ignore[misc]
    return method


def test_ours_codes_what_it_has_read(tmp_path: Path) -> None:
    """Few bits change the answer's probability, and only because the text behind the tail is coded."""
    prompt = prompt_of(600)
    two = PresetHolder(preset_of("llama", 2.0), shape(), TAIL)
    all_exact = PresetHolder(preset_of("llama", 2.0), shape(), 4096, "all in the tail")
    all_exact.name = "all in the tail"
    exact, coarse, tail = run(tmp_path / "trials.jsonl", [prompt], ExactHolder(), two, all_exact)
    assert tail.log_probs == pytest.approx(exact.log_probs, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(coarse.log_probs, exact.log_probs, strict=True)) > 1e-3


@pytest.mark.parametrize("n_text", [100, 160])
def test_sinks_tail_and_odd_groups_stay_exact(n_text: int, tmp_path: Path) -> None:
    method = Spoiled()
    method.group_len = 32
    run(tmp_path / "trials.jsonl", [prompt_of(n_text)], coded(method))
    n_coded = (n_text + 6 - TAIL - N_SINKS) // 32 * 32
    assert method.asked == [
        (layer, side, n_coded, N_SINKS) for layer in range(2) for side in ("key", "value")
    ]


def test_the_tail_can_hold_everything(tmp_path: Path) -> None:
    method = Spoiled()
    (exact, trial) = run(tmp_path / "trials.jsonl", [prompt_of(18)], ExactHolder(), coded(method))
    assert len(method.asked) == 4  # 18 + 6 tokens, less 16 and 4, are 4
    assert trial.log_prob != exact.log_prob
    kivi = Kivi(shape(), 2)
    (same,) = run(tmp_path / "trials.jsonl", [prompt_of(18)], coded(kivi))  # no group of 32
    assert same.log_probs == exact.log_probs


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny("llama", attn_implementation="eager")
    holder = PresetHolder(preset_of("llama", 3.0), shape(), TAIL)
    for attached in (False, True):
        if attached:
            attach(model)
        list(
            search(model, [prompt_of(40 + attached)], [holder], setting(), Trials(tmp_path / "trials.jsonl"))
        )
        assert is_attached(model) == attached


# Runs


def test_a_rerun_runs_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    first = run(path, [prompt_of()], ExactHolder(), coded(Spoiled()))
    again = Spoiled()
    kept: list[Trial] = []
    prompts = [prompt_of(), prompt_of(seed=9)]
    both = list(
        search(
            model_of("llama"),
            prompts,
            [ExactHolder(), coded(again)],
            setting(),
            Trials(path),
            on_kept=kept.append,
        )
    )
    assert kept == first == both[:2]
    assert len(again.asked) == 4  # of the new prompt's two layers and sides
    assert len(path.read_text().splitlines()) == 4
    assert [Trials(path).get(trial.key) for trial in both] == both


def test_an_interruption_keeps_trials(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, [prompt_of()], ExactHolder(), coded(Spoiled(interrupted)))
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    assert [trial.name for trial in run(path, [prompt_of()], ExactHolder(), coded(Spoiled()))] == [
        "exact",
        "spoiled",
    ]
    assert len(Trials(path)) == 2


def test_keys_tell_apart_what_matters() -> None:
    base, prompt, holder = setting(), prompt_of(), ExactHolder()
    others = [
        dataclasses.replace(base, **change)
        for change in ({"model_digest": "x"}, {"dtype": "bfloat16"}, {"chunk": 64}, {"library_version": "x"})
    ]
    keys = {of.key(holder, prompt) for of in [base, *others]}
    keys |= {base.key(holder, prompt_of(seed=3))}
    holders: list[Holder] = [
        CodedHolder(Spoiled(), shape(), n_sinks, tail) for n_sinks in (0, 4) for tail in (8, 16)
    ]
    holders += [
        PresetHolder(preset_of("llama", bits), shape(), tail) for bits in (2.0, 3.0) for tail in (8, 16)
    ]
    keys |= {base.key(of, prompt) for of in holders}
    assert len(keys) == 1 + len(others) + 1 + 8
    assert dataclasses.replace(base, model="elsewhere", text="named anew").key(holder, prompt) in keys


def test_two_caches_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="spoiled"):
        run(tmp_path / "trials.jsonl", [prompt_of()], coded(Spoiled()), coded(Spoiled()))


# Tables, grids, reports


def trials_by_hand() -> list[Trial]:
    """Two caches, lengths, depths and kinds; the second finds half of the needles, at e^-1 less a token."""
    return [
        Trial(
            key=f"{name}{kind}{length}{depth}",
            setting=setting(),
            name=name,
            family=name,
            kind=kind,
            number=0,
            length=length,
            depth=depth,
            needle_at=1,
            answer="42",
            log_probs=(-0.25 - worse, -0.75 - worse),
            found=not worse or depth == 0.0,
            bits_per_value=16.0,
            coded_bits=bits,
            seconds=1.0,
        )
        for name, worse, bits in (("exact", 0.0, 16.0), ("kvlathe 2.25 bits", 1.0, 2.25))
        for length in (1024, 3000)
        for depth in (0.0, 1.0)
        for kind in ("number", "fact")
    ]


def test_tables() -> None:
    by_length, by_kind = rows_by_length(trials_by_hand()), rows_by_kind(trials_by_hand())
    assert by_length[0] == (
        "cache",
        "coded bits",
        "1,024: found",
        "log-prob",
        "3,000: found",
        "log-prob",
        "all: found",
        "log-prob",
        "against exact (95 %)",
    )
    assert by_length[1] == ("exact", "16.00", *("100 %", "-0.500") * 3, "")
    assert by_length[2] == (
        "kvlathe 2.25 bits",
        "2.25",
        *("50 %", "-1.500") * 3,
        "-1.000 (-1.000 to -1.000)",
    )
    assert by_kind[0][2::2] == ("number: found", "fact: found", "against exact (95 %)")
    assert markdown(by_kind).splitlines()[2].startswith("| exact | 16.00 | 100 % |")


def test_a_table_without_the_exact_cache() -> None:
    assert rows_by_length(trials_by_hand()[8:])[1][-1] == ""


def test_grids() -> None:
    """Rows are depths from the text's beginning on, columns are lengths."""
    trials = trials_by_hand()
    found, log_prob = (draw(trials) for draw in PLOTS.values())
    panels = [axes for axes in found.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["exact", "kvlathe 2.25 bits"]
    assert panels[1].images[0].get_array().tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["1K", "3,000"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0%", "100%"]
    assert log_prob.axes[1].images[0].get_array().tolist() == [[-1.5, -1.5]] * 2
    # A cell that was not run is a hole.
    hole = [trial for trial in trials if (trial.length, trial.depth) != (1024, 0.0)]
    cells = PLOTS["needle-found"](hole).axes[0].images[0].get_array().filled(math.nan)
    assert [math.isnan(cell) for cell in cells.flatten()] == [True, False, False, False]
    assert svg(log_prob).startswith("<svg")


def test_the_report_needs_nothing_else() -> None:
    trials = [
        dataclasses.replace(trial, setting=dataclasses.replace(trial.setting, model="<b>tiny</b>"))
        for trial in trials_by_hand()
    ]
    page = html_report(trials, ["hf-hqq-4 does not run here: install <hqq>"])
    assert page.count("<svg") == len(PLOTS)
    assert "&lt;b&gt;tiny" in page and "<b>tiny" not in page and "&lt;hqq&gt;" in page
    assert page.count("<tr class=ours>") == 2
    assert "<script" not in page and "<link" not in page and "8 needles" in page
