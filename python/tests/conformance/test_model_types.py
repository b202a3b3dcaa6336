"""The model types that people use most are served from the blocks, and give the stock cache's tokens."""

from __future__ import annotations

import pytest

from model_types import BEGIN, END, PAGE, check
from small_models import build

# One of each kind of attention and of what is downloaded most; all others are in the table of docs/models.md.
SERVED = (
    "apertus arcee bart cohere cohere2 ernie4_5 exaone4 falcon gemma gemma3_text glm glm4 gpt2 gpt_neox granite helium "
    "llama llama4_text mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 stablelm starcoder2 gemma3 LlavaForConditionalGeneration "
    "Qwen2_5_VLForConditionalGeneration"
).split()
ATTACHED = ["gemma2", "gpt_oss", "vaultgemma"]


@pytest.mark.parametrize("name", SERVED)
def test_served_from_the_blocks(name: str) -> None:
    row = check(name)
    assert (row.same, row.outcome) == ("yes", "from blocks")


@pytest.mark.parametrize("name", ATTACHED)
def test_served_from_the_blocks_once_attached(name: str) -> None:
    row = check(name)
    # transformers 5.20 runs some of them on SDPA, and leaves their caps out.
    eager = build(name).model.config._attn_implementation == "eager"
    assert (row.same, row.outcome) == ("yes", "from blocks, with attach()" if eager else "from blocks")


def test_the_table_says_the_same() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for name in SERVED:
        assert (
            f"\n| {name} |" in table
            and "| yes | from blocks |" in table.split(f"\n| {name} |")[1].split("\n")[0]
        )
