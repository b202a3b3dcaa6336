"""Whether keys turn by one position each or by several: with M-RoPE a patch of an image has a time, a row and a column.

What a cache is handed does not tell by which positions keys were turned, so blocks are turned by the index of their
slots. Text has that index on all axes; an image has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..given_model import input_device

_N_AXES = (2, 3, 4)
_N_TOKENS = 5


def has_several_axes(model: PreTrainedModel) -> bool:
    """By experiment: a module with rotary frequencies mixes several rows of positions into one table. Where the
    layers do the mixing, by what divides the frequencies: something called ``mrope_section`` or the like.
    """
    config = model.config.get_text_config(decoder=True)
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    modules = list((model if decoder is None else decoder).modules())
    if any(_is_section(name, value) for owner in _owners(config, modules) for name, value in owner.items()):
        return True
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    return any(_mixes_axes(module, kinds, input_device(model)) for module in modules if _is_rotary(module))


def _owners(config: Any, modules: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """Whatever may name sections: the config's RoPE settings, one or one for each kind of layer, and the modules."""
    for settings in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(settings, dict):
            yield settings
            yield from (entry for entry in settings.values() if isinstance(entry, dict))
    yield from (vars(module) for module in modules)


def _is_section(name: str, value: Any) -> bool:
    return name.endswith("rope_section") and isinstance(value, (list, tuple, dict)) and len(value) > 0


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


@torch.no_grad()
def _mixes_axes(module: nn.Module, kinds: list[str], device: torch.device) -> bool:
    """Whether the last of several rows of positions changes the one table that comes out."""
    x = torch.zeros(1, _N_TOKENS, 1, device=device)
    for n_axes in _N_AXES:
        still = torch.zeros(n_axes, 1, _N_TOKENS, dtype=torch.long, device=device)
        moved = still.clone()
        moved[-1] = torch.arange(_N_TOKENS, device=device)
        for extra in ({}, *({"layer_type": kind} for kind in kinds)):
            try:
                before, after = (_table(module(x, positions, **extra)) for positions in (still, moved))
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
                continue  # not made for so many axes
            if before is not None and after is not None and not torch.equal(before, after):
                return True
    return False


def _table(output: Any) -> Tensor | None:
    """The cosines for one row of tokens; None where each row of positions gave a table of its own."""
    table = output[0] if isinstance(output, tuple) and output else output
    is_one = isinstance(table, Tensor) and table.dim() == 3 and table.shape[:2] == (1, _N_TOKENS)
    return table if is_one else None
