"""Retrieval: what a model still finds in a long text when its cache is compressed."""

from __future__ import annotations

from .caches import CodedHolder, ExactHolder, Holder, PresetHolder
from .haystack import Haystack
from .needle import KINDS, Needle, NeedleKind
from .prompt import Prompt, make_prompt, make_prompts
from .run import Setting, Trial, Trials, search

__all__ = [
    "KINDS",
    "CodedHolder",
    "ExactHolder",
    "Haystack",
    "Holder",
    "Needle",
    "NeedleKind",
    "PresetHolder",
    "Prompt",
    "Setting",
    "Trial",
    "Trials",
    "make_prompt",
    "make_prompts",
    "search",
]
